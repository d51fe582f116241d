"""A self-contained HTML report of runs: the table, plots, and every question with every arm's answer."""

from eval_mcq.html_report.page import ReportOptions, write_report

__all__ = ["ReportOptions", "write_report"]

"""The command ``mgll-encoder``."""

from mgll_encoder.cli import data, explain, pretrain, probe, tower, zero_shot
from mgll_encoder.common.cli import new_app, run

app = new_app("Read, convert, train and probe MGLL vision towers.")
app.command("inspect")(tower.inspect)
app.command("convert")(tower.convert)
app.add_typer(data.app, name="data")
app.command("pretrain")(pretrain.pretrain)
app.command("probe")(probe.probe)
app.command("zero-shot")(zero_shot.zero_shot)
app.command("retrieval")(zero_shot.retrieval)
app.command("explain")(explain.explain)


def main() -> None:
    """Entry point."""
    run(app, "mgll-encoder")

"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
  const BATCH = 60;
  const form = document.getElementById("filters");
  const list = document.getElementById("list");
  const dialog = document.getElementById("detail");
  const section = document.getElementById("questions");
  const last = data.arms.length - 1;
  let found = [];
  let open = -1;

  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const letter = (index) => (index < 0 ? "unparsed" : LETTERS[index]);
  const verdict = (item, arm) => (item.right[arm] ? "right" : "wrong");
  const rotations = (item, arm) => {
    const [right, all] = item.rotations[arm];
    return all > 1 ? ` (${right} of ${all} orders)` : "";
  };
  const mark = (item, arm) =>
    make("span", { className: item.right[arm] ? "good" : "bad" },
      make("span", { ariaHidden: "true" }, item.right[arm] ? "✓ " : "✗ "),
      `${data.arms[arm]} ${letter(item.chosen[arm])}${rotations(item, arm)}`,
      make("span", { className: "spoken" }, ` ${verdict(item, arm)}. `));

  // A table that is wider than the page says so, and shows a shadow on the side where it goes on.
  const hint = (area) => {
    const left = area.scrollWidth - area.clientWidth;
    area.parentElement.classList.toggle("scrolls", left > 1);
    area.parentElement.classList.toggle("more", left - area.scrollLeft > 1);
    if (left > 1) area.tabIndex = 0; else area.removeAttribute("tabindex");
  };
  const sized = new ResizeObserver((entries) => entries.forEach((entry) => hint(entry.target)));
  for (const area of document.querySelectorAll(".scroll")) {
    sized.observe(area);
    area.addEventListener("scroll", () => hint(area), { passive: true });
  }

  // Flips are read between an arm and the one that it is compared with.
  const before = (item, arm) => item.right[data.against[arm]];
  const FLIPS = {
    fixed: (item, arm) => !before(item, arm) && item.right[arm],
    broken: (item, arm) => before(item, arm) && !item.right[arm],
    either: (item, arm) => before(item, arm) !== item.right[arm],
  };
  const FLIP_NAMES = { fixed: "wrong → right", broken: "right → wrong", either: "either way" };

  const searched = data.items.map((item) =>
    [item.id, item.category, item.source, item.patient, ...item.tags, data.texts[item.question],
      ...item.options.map((i) => data.texts[i])].join("\n").toLowerCase());

  const option = (value, text) => make("option", { value }, text);
  for (const name of data.categories) form.elements.category.append(option(name, name));
  data.arms.forEach((name, arm) => {
    const select = make("select", { name: `arm-${arm}` }, option("", "all"), option("right", "right"), option("wrong", "wrong"));
    document.getElementById("arm-filters").append(make("label", {}, `${name} `, select), " ");
  });
  if (last > 0) {
    document.getElementById("flip-filter").hidden = false;
    for (let arm = 1; arm <= last; arm++) {
      for (const kind of Object.keys(FLIPS)) {
        form.elements.flip.append(option(`${kind}:${arm}`, `${data.arms[data.against[arm]]} to ${data.arms[arm]}: ${FLIP_NAMES[kind]}`));
      }
    }
  }

  const passes = () => {
    const category = form.elements.category.value;
    const text = form.elements.text.value.trim().toLowerCase();
    const [kind, arm] = form.elements.flip.value.split(":");
    const verdicts = data.arms.map((_, i) => form.elements[`arm-${i}`].value);
    return (item, i) =>
      (!category || item.category === category) &&
      verdicts.every((wanted, a) => !wanted || verdict(item, a) === wanted) &&
      (!kind || FLIPS[kind](item, Number(arm))) &&
      (!text || searched[i].includes(text));
  };

  const picture = (item, lazy) => {
    if (!data.sources.length) return [];
    return item.images.map((i) =>
      make("img", { src: data.sources[i], alt: `image of question ${item.id}`, loading: lazy ? "lazy" : "eager", decoding: "async" }));
  };

  const card = (item, place) => {
    const button = make("button", { type: "button" }, ...picture(item, true).slice(0, 1), make("strong", {}, item.category),
      make("span", { className: "marks" }, ...data.arms.map((_, arm) => mark(item, arm))));
    button.addEventListener("click", () => show(place));
    return make("li", {}, button);
  };

  const more = document.getElementById("more");
  const bottom = new IntersectionObserver((seen) => seen.some((entry) => entry.isIntersecting) && grow(), { rootMargin: "800px" });

  const grow = () => {
    const from = list.childElementCount;
    list.append(...found.slice(from, from + BATCH).map((i, place) => card(data.items[i], from + place)));
    // Asked anew: of an end that is in sight before and after, the browser would not tell.
    bottom.unobserve(more);
    if (list.childElementCount < found.length) bottom.observe(more);
  };

  const filter = () => {
    const wanted = passes();
    found = data.items.map((_, i) => i).filter((i) => wanted(data.items[i], i));
    const right = data.arms.map((name, arm) => `${name} ${found.filter((i) => data.items[i].right[arm]).length} right`);
    document.getElementById("count").textContent = `${found.length} of ${data.items.length} questions; ${right.join(", ")}`;
    list.replaceChildren();
    grow();
    const chosen = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
    history.replaceState(null, "", chosen.size ? `#questions?${chosen}` : location.hash.split("?")[0] || location.pathname + location.search);
  };

  const figures = (item, index) =>
    data.arms.map((name, arm) => {
      const share = item.probabilities[arm][index];
      const chosen = item.chosen[arm] === index;
      const text = share === undefined ? "" : `${(100 * share).toFixed(1)} %`;
      const fill = make("i");
      fill.style.width = `${100 * (share ?? 0)}%`;
      fill.style.background = `var(--arm-${arm % data.colors})`;
      return make("div", { className: "figure" }, make("span", {}, chosen ? make("strong", {}, `▸ ${name}`) : name),
        make("span", { className: "bar" }, fill), make("span", {}, text));
    });

  const show = (place) => {
    open = place;
    const item = data.items[found[place]];
    const options = item.options.map((text, index) =>
      make("div", { className: index === item.answer ? "option true" : "option" },
        make("div", {}, `${LETTERS[index]}. ${data.texts[text]}${index === item.answer ? " (true)" : ""}`), ...figures(item, index)));
    const step = (by, text) => {
      const button = make("button", { type: "button", disabled: !(place + by in found) }, text);
      button.addEventListener("click", () => show(place + by));
      return button;
    };
    const close = make("button", { type: "button" }, "Close");
    close.addEventListener("click", () => dialog.close());
    const facts = [item.source, item.patient && `patient ${item.patient}`, ...item.tags].filter(Boolean).join(", ");
    dialog.replaceChildren(
      make("h2", { id: "detail-title" }, `${item.category} (${place + 1} of ${found.length})`),
      make("div", { className: "detail" },
        make("div", {}, ...picture(item, false), make("p", { className: "notes" }, item.id, make("br"), facts)),
        make("div", {}, make("p", {}, data.texts[item.question]), ...options,
          make("p", { className: "marks" }, ...data.arms.map((_, arm) => mark(item, arm))))),
      make("div", { className: "buttons" }, step(-1, "← Before"), step(1, "Next →"), close));
    if (!dialog.open) dialog.showModal();
    dialog.focus({ preventScroll: true });
    dialog.scrollTop = 0;
  };

  dialog.addEventListener("close", () => list.children[open]?.querySelector("button").focus());
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { ArrowRight: 1, ArrowDown: 1, j: 1, ArrowLeft: -1, ArrowUp: -1, k: -1 }[event.key];
    if (event.key === "/" && section.contains(document.activeElement)) {
      event.preventDefault();
      form.elements.text.focus();
    } else if (by && dialog.open && open + by in found) {
      event.preventDefault();
      show(open + by);
      while (list.childElementCount <= open) grow();
    } else if (by && list.contains(document.activeElement)) {
      event.preventDefault();
      const place = [...list.children].indexOf(document.activeElement.closest("li")) + by;
      if (place >= list.childElementCount) grow();
      list.children[place]?.querySelector("button").focus();
    }
  });
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));

  for (const [name, value] of new URLSearchParams(location.hash.split("?")[1] ?? "")) {
    if (form.elements[name]) form.elements[name].value = value;
  }
  filter();
})();

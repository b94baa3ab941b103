"use strict";
// Sorting, filters, the comparison and the switch between dark and light. Text from results is set as text only.
(() => {
  const find = (id) => document.getElementById(id);

  const make = (name, text, attributes = {}) => {
    const element = document.createElement(name);
    element.textContent = text;
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };

  const startTheme = () => {
    const button = find("theme"), root = document.documentElement;
    const read = () => { try { return localStorage.getItem("robbench-theme"); } catch { return null; } };
    if (read()) root.dataset.theme = read();
    button.hidden = false;
    button.addEventListener("click", () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      try { localStorage.setItem("robbench-theme", root.dataset.theme); } catch { /* the switch holds for this page */ }
    });
  };

  const startSorting = (table) => {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const numeric = [...body.rows].some((row) => row.cells[column].dataset.value !== undefined);
        const now = head.getAttribute("aria-sort");
        const down = now ? now === "ascending" : numeric; // of numbers, the largest come first
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const compare = (a, b) => {
          const [x, y] = [a.cells[column], b.cells[column]];
          if (numeric) return Number(x.dataset.value ?? -Infinity) - Number(y.dataset.value ?? -Infinity);
          return x.textContent.localeCompare(y.textContent, "en", { numeric: true });
        };
        body.append(...[...body.rows].sort((a, b) => (down ? compare(b, a) : compare(a, b))));
      });
    });
  };

  const startFilters = (filters) => {
    const table = document.querySelector("table.sortable"), rows = [...table.tBodies[0].rows];
    const text = find("filter-text"), quick = find("filter-quick"), boxes = [...filters.querySelectorAll("select")];
    const cell = (row, heading) => {
      const found = [...row.cells].find((c) => c.dataset.label === heading);
      return (found.querySelector(".verdict") ?? found).textContent; // a verdict without its n
    };
    const apply = () => {
      const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const all = row.textContent.toLowerCase() + " " + cell(row, "Data set") + "/" + row.cells[0].textContent.toLowerCase();
        const fits = words.every((word) => all.includes(word)) &&
          boxes.every((box) => !box.value || cell(row, box.dataset.column) === box.value) &&
          (quick.checked || !row.querySelector(".quick"));
        row.hidden = !fits;
        shown += fits;
      }
      find("count").textContent = `${shown} of ${rows.length} rows`;
    };
    const asked = new URLSearchParams(location.search).get("q");
    if (asked) { text.value = asked; quick.checked = true; find("find").value = asked; }
    filters.hidden = false;
    filters.addEventListener("input", apply);
    apply();
  };

  const startComparison = (groups) => {
    const [group, first, second] = ["group", "first", "second"].map((name) => find(`choose-${name}`));
    const fill = (box, names) => box.replaceChildren(...names.map((name, i) => make("option", name, { value: i })));
    const fillModels = () => {
      const names = groups[group.value].models.map((model) => model.name);
      [first, second].forEach((box, i) => { fill(box, names); box.value = i; });
    };
    const show = () => showPair(groups[group.value], Number(first.value), Number(second.value));
    fill(group, groups.map((g) => g.title));
    const key = decodeURIComponent(location.hash.slice(1));
    const at = groups.findIndex((g) => g.models.some((model) => model.key === key));
    group.value = Math.max(at, 0);
    fillModels();
    if (at >= 0) {
      first.value = groups[at].models.findIndex((model) => model.key === key);
      second.value = first.value === "0" ? 1 : 0;
    }
    find("choice").hidden = false;
    group.addEventListener("change", () => { fillModels(); show(); });
    [first, second].forEach((box) => box.addEventListener("change", show));
    show();
  };

  // The pairs are listed as (0, 1), (0, 2), ..., (1, 2), ...
  const place = (i, j, n) => i * n - (i * (i + 1)) / 2 + (j - i - 1);

  const showPair = (group, i, j) => {
    const out = find("pair"), models = group.models;
    if (i === j) return out.replaceChildren(make("p", "Choose two different models."));
    const pair = group.pairs[place(Math.min(i, j), Math.max(i, j), models.length)];
    if (!pair) return out.replaceChildren(make("p", "The two models were attacked on no common image."));
    const [n, a, b, both, difference, low, high, p] = pair, turned = i > j;
    const [aOnly, bOnly] = turned ? [b, a] : [a, b]; // robust in this model only
    const [d, from, to] = turned ? [-difference, -high, -low] : [difference, low, high];
    const [A, B] = [models[i], models[j]], sign = (x) => (x >= 0 ? "+" : "−") + Math.abs(x).toFixed(1);
    const verdict = p >= 0.05 ? "The difference is not significant." :
      `${d > 0 ? A.name : B.name} is more robust under the stored attacks.`;
    const head = document.createElement("p");
    head.append(make("a", A.name, { href: A.page }), " and ", make("a", B.name, { href: B.page }), `, ${n} common images.`);
    const list = document.createElement("ul");
    list.append(
      make("li", `A minus B: ${sign(d)} points [${sign(from)},\u00a0${sign(to)}], McNemar p ${p < 0.001 ? "below 0.001" : p.toFixed(3)}. ${verdict}`),
      make("li", `Both keep ${n - a - b - both}. Both lose ${both}.`),
      make("li", `Only A, ${A.name}, loses ${bOnly}.`),
      make("li", `Only B, ${B.name}, loses ${aOnly}.`),
    );
    const [lostA, lostB] = [listLost(A, B), listLost(B, A)];
    out.replaceChildren(head, list, ...name(`Images that only ${A.name} loses`, lostA), ...name(`Images that only ${B.name} loses`, lostB));
  };

  const listLost = (model, other) => {
    const kept = new Map(other.samples.map((sample, k) => [sample, other.robust[k] === "1"]));
    return model.samples.filter((sample, k) => model.robust[k] === "0" && kept.get(sample));
  };

  const name = (title, samples) => [
    make("h2", title),
    make("p", samples.length ? `Indices in the test set: ${samples.join(", ")}.` : "None.", { class: "ids" }),
  ];

  const startReloading = (box) => {
    const key = "robbench-reload";
    try { box.checked = sessionStorage.getItem(key) !== "no"; } catch { /* it stays as it is */ }
    box.parentElement.hidden = false;
    setInterval(() => { if (box.checked) location.reload(); }, 1000 * box.dataset.seconds);
    box.addEventListener("change", () => {
      try { sessionStorage.setItem(key, box.checked ? "yes" : "no"); } catch { /* it holds until the next reload */ }
    });
  };

  startTheme();
  if (find("reload")) startReloading(find("reload"));
  document.querySelectorAll("table.sortable").forEach(startSorting);
  if (find("filters")) startFilters(find("filters"));
  const data = find("data");
  if (data && find("pair")) startComparison(JSON.parse(data.textContent));
})();

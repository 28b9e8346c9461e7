"use strict";
(() => {
  const filter = document.getElementById("filter");
  const shown = document.getElementById("shown");
  const unfold = document.getElementById("unfold");
  const bodies = [...document.querySelectorAll("table.layers tbody")].map((body, position) => {
    const head = body.querySelector(".group");
    const rows = [...body.rows].filter((row) => row !== head);
    return { body, head, rows, position, details: body.querySelector("details"), opened: false };
  });
  const total = bodies.reduce((sum, group) => sum + group.rows.length, 0);
  const texts = new Map();
  const textOf = (row) => {
    if (!texts.has(row)) texts.set(row, row.textContent.toLowerCase());
    return texts.get(row);
  };

  function applyFilter() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (row) => words.every((word) => textOf(row).includes(word));
    let count = 0;
    for (const group of bodies) {
      const whole = !words.length || (group.head && matches(group.head));
      let found = 0;
      for (const row of group.rows) {
        row.hidden = !(whole || matches(row));
        found += !row.hidden;
      }
      group.body.hidden = !found;
      count += found;
      // A group opens for a filter that only some of its layers meet, and closes when the filter is gone.
      const open = !whole && found > 0;
      if (group.details && open && !group.details.open) group.details.open = group.opened = true;
      if (group.details && !open && group.opened) group.details.open = group.opened = false;
    }
    shown.textContent = words.length ? `${count} of ${total} rows` : `${total} rows`;
  }
  filter.addEventListener("input", applyFilter);

  unfold.addEventListener("click", () => {
    const open = unfold.getAttribute("aria-pressed") !== "true";
    unfold.setAttribute("aria-pressed", String(open));
    for (const group of bodies) if (group.details) group.details.open = open;
  });

  const compareText = new Intl.Collator("en", { numeric: true }).compare;
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.v ?? cell.textContent.trim();
  };
  function compare(a, b, sign) {
    if (a === "" || b === "") return (a === "") - (b === ""); // unknown values come last
    const [x, y] = [Number(a), Number(b)];
    return sign * (Number.isNaN(x) || Number.isNaN(y) ? compareText(a, b) : x - y || 0);
  }
  const sorted = (items, row, column, sign) => {
    const keyed = items.map((item) => [keyOf(row(item), column), item]);
    return keyed.sort((a, b) => compare(a[0], b[0], sign)).map((pair) => pair[1]);
  };
  for (const table of document.querySelectorAll("table.layers")) {
    const own = bodies.filter((group) => group.body.parentNode === table);
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[header.ariaSort];
      for (const each of headers) each.ariaSort = each === header ? next : "none";
      const sign = { ascending: 1, descending: -1 }[next];
      const order = sign ? sorted(own, (group) => group.head ?? group.rows[0], column, sign) : own;
      for (const group of order) {
        group.body.append(...(sign ? sorted(group.rows, (row) => row, column, sign) : group.rows));
      }
      table.append(...order.map((group) => group.body));
    }));
  }

  // Measured layers are sorted worst first.
  for (const button of document.querySelectorAll("[data-first] button")) button.click();

  // Older browsers print closed details as closed.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const each of closed) each.open = true;
  });
  addEventListener("afterprint", () => closed.forEach((each) => { each.open = false; }));
  applyFilter();
})();

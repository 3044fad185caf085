const table = document.querySelector("#results"), body = table.tBodies[0];
const rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
const value = (row, k) =>
  heads[k].className === "text" ? row.cells[k].textContent : parseFloat(row.cells[k].dataset.value);
heads.forEach((head, k) => {
  const button = document.createElement("button");
  button.textContent = head.textContent; button.title = "sort"; head.replaceChildren(button);
  button.onclick = () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const order = (a, b) => { const x = value(a, k), y = value(b, k);
      if (typeof x === "string") return up ? x.localeCompare(y) : y.localeCompare(x);
      return (isNaN(x) - isNaN(y)) || (up ? x - y : y - x); };
    body.append(...rows.sort(order));
  };
});
const controls = document.querySelector(".controls"), count = document.createElement("span");
const find = document.createElement("input"), picks = [];
const show = () => {
  let shown = 0;
  for (const row of rows) {
    const fits = row.textContent.toLowerCase().includes(find.value.toLowerCase())
      && picks.every(([k, pick]) => !pick.value || row.cells[k].textContent === pick.value);
    row.hidden = !fits; shown += fits;
  }
  count.textContent = `${shown} of ${rows.length} rows`;
};
find.type = "search"; find.placeholder = "find in the table"; find.ariaLabel = find.placeholder;
find.oninput = show; controls.append(find);
heads.forEach((head, k) => {
  const texts = () => new Set(rows.map(row => row.cells[k].textContent));
  const found = head.className === "text" ? [...texts()] : [];
  if (found.length < 2) return;
  const pick = document.createElement("select");
  pick.ariaLabel = head.textContent; pick.onchange = show;
  const every = new Option(`every ${head.textContent}`, "");
  pick.append(every, ...found.map(name => new Option(name, name)));
  picks.push([k, pick]); controls.append(pick);
});
controls.append(count); show();

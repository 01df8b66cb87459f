"use strict";
(function () {
  // ---------------------------------------------------------------- the sortable table
  const table = document.getElementById("cases");
  if (table) {
    const body = table.tBodies[0];
    const headings = Array.from(table.tHead.rows[0].cells);
    const key = (row, column, text) => {
      const value = row.cells[column].dataset.value || "";
      return text ? value : value === "" ? null : Number(value);
    };
    headings.forEach((heading, column) => {
      const button = heading.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const text = button.hasAttribute("data-text");
        // numbers start with the largest, names with A; blanks stay at the end either way
        const now = heading.getAttribute("aria-sort");
        const ascending = now === "none" ? text : now === "descending";
        headings.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
        heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        const sign = ascending ? 1 : -1;
        const rows = Array.from(body.rows);
        rows.sort((a, b) => {
          const x = key(a, column, text), y = key(b, column, text);
          if (x === null || y === null) return (x === null) - (y === null);
          return sign * (text ? x.localeCompare(y) : x - y);
        });
        rows.forEach((row) => body.appendChild(row));
      });
    });
  }

  // ---------------------------------------------------------------- the slice viewer
  const block = document.getElementById("viewer-data");
  if (!block) return;
  const data = JSON.parse(block.textContent);
  const slider = document.getElementById("slice");
  const opacity = document.getElementById("opacity");
  const ct = document.getElementById("ct");
  const text = document.getElementById("slice-text");
  const layers = Object.keys(data.layers);
  const show = () => {
    const index = Number(slider.value);
    const chosen = document.querySelector('input[name="layer"]:checked').value;
    ct.src = data.ct[index];
    layers.forEach((name) => {
      const image = document.getElementById("layer-" + name);
      image.hidden = name !== chosen;
      image.style.opacity = Number(opacity.value) / 100;
      if (name === chosen) image.src = data.layers[name][index];
    });
    text.textContent = data.slices[index];
  };
  const move = (step) => {
    slider.value = Number(slider.value) + step;
    show();
  };
  slider.addEventListener("input", show);
  opacity.addEventListener("input", show);
  document.querySelectorAll('input[name="layer"]').forEach((choice) => choice.addEventListener("change", show));
  document.querySelector(".stack").addEventListener("wheel", (event) => {
    event.preventDefault();
    move(event.deltaY > 0 ? -1 : 1);
  }, { passive: false });
  document.addEventListener("keydown", (event) => {
    if (event.target.tagName === "INPUT") return;
    if (event.key === "ArrowUp" || event.key === "ArrowRight") move(1);
    else if (event.key === "ArrowDown" || event.key === "ArrowLeft") move(-1);
    else return;
    event.preventDefault();
  });
  show();
})();

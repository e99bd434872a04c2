"use strict";
// Charts are whole without this: it reads values at the pointer or by arrow keys, and filters.

const names = [...document.querySelectorAll(".legend li")].map((item) => item.textContent);

function valueText(value, error) {
  return error ? `${value} ± ${error}` : `${value}`;
}

function readable(figure) {
  const lines = JSON.parse(figure.dataset.lines);
  const plot = figure.querySelector(".plot");
  const svg = plot.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  const usual = readout.textContent;
  const [low, high, begin, end] = plot.dataset.x.split(" ").map(Number);
  const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  let place = steps.length - 1;

  function say(index) {
    place = Math.min(Math.max(index, 0), steps.length - 1);
    const step = steps[place];
    const told = lines.flatMap((line) => {
      const i = line.x.indexOf(step);
      if (i < 0) return [];
      const text = valueText(line.y[i], line.e && line.e[i]);
      return [names.length ? `${names[line.r]} ${text}` : text];
    });
    readout.textContent = `step ${step}: ${told.join("; ")}`;
    const x = begin + ((step - low) / (high - low)) * (end - begin);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    plot.setAttribute("aria-valuenow", step);
    plot.setAttribute("aria-valuetext", readout.textContent);
  }

  function rest() {
    readout.textContent = usual;
    cursor.setAttribute("visibility", "hidden");
  }

  function point(event) {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const step = low + ((x - begin) / (end - begin)) * (high - low);
    let nearest = 0;
    steps.forEach((own, i) => {
      if (Math.abs(own - step) < Math.abs(steps[nearest] - step)) nearest = i;
    });
    say(nearest);
  }

  function press(event) {
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
    if (event.key in moves) say(place + moves[event.key]);
    else if (event.key === "Home") say(0);
    else if (event.key === "End") say(steps.length - 1);
    else return;
    event.preventDefault();
  }

  plot.tabIndex = 0;
  plot.setAttribute("role", "slider");
  plot.setAttribute("aria-label", `${figure.dataset.name} by step. ${svg.querySelector("desc").textContent}`);
  plot.setAttribute("aria-valuemin", steps[0]);
  plot.setAttribute("aria-valuemax", steps[steps.length - 1]);
  plot.setAttribute("aria-valuenow", steps[place]);
  plot.setAttribute("aria-valuetext", usual || `step ${steps[place]}`);
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", rest);
  plot.addEventListener("focus", () => plot.matches(":focus-visible") && say(place));
  plot.addEventListener("blur", rest);
  plot.addEventListener("keydown", press);
}

document.querySelectorAll("figure[data-lines]").forEach(readable);

const filter = document.getElementById("filter");
if (filter) {
  document.getElementById("filter-label").hidden = false;
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    document.querySelectorAll("#curves figure").forEach((figure) => {
      figure.hidden = !figure.dataset.name.toLowerCase().includes(wanted);
    });
    document.querySelectorAll("#curves .group").forEach((group) => {
      group.hidden = wanted !== "" && !group.querySelector("figure:not([hidden])");
    });
  });
}

// The calculator of the study "CPU or GPU?": the formulas of cpu_or_gpu.calculate in the package.
// Everything happens on this page; nothing is sent anywhere.

const PLACES = ["laptop", "cpu", "gpu"];

function payOff(hours, each, rate, setup) {
  if (rate <= 0) return 0;
  const left = each / rate - setup;
  return left > 0 ? hours / left : null;
}

function calculate(v) {
  const students = v.students || 0;
  const hours = ((v.runs || 0) * (v.seconds || 0)) / 3600;
  const found = {};
  for (const place of PLACES) {
    const speed = v[place + "_speed"];
    const setup = (v[place + "_setup"] || 0) / 60;
    if (!speed) {
      found[place] = null;
      continue;
    }
    const each = hours / speed + setup;
    const total = students * each;
    const atOnce = place === "laptop" ? students : v[place + "_machines"] || 1;
    const kwh = (total * (v[place + "_watts"] || 0)) / 1000;
    const paid = place === "laptop" ? kwh * (v.electricity || 0) : 0;
    found[place] = {
      hours_each: each,
      machine_hours: total,
      wall_hours: Math.ceil(students / atOnce) * each,
      kwh: kwh,
      money: total * (v[place + "_price"] || 0) + paid,
    };
  }
  const start = (v.gpu_setup || 0) / 60;
  const pays = (key, rate) =>
    found.cpu && payOff(hours, found.cpu[key] / students, rate, start);
  found.gpu_pays_from = {
    money: pays("money", v.gpu_price || 0),
    energy: pays("kwh", (v.gpu_watts || 0) / 1000),
  };
  return found;
}

function showCalculator(form) {
  const values = {};
  let wrong = "";
  for (const input of form.querySelectorAll("input")) {
    const number = input.value.trim() === "" ? null : Number(input.value);
    values[input.name] = number;
    const bad = !input.checkValidity() || (number === null && input.required);
    input.setAttribute("aria-invalid", String(bad));
    if (bad && !wrong)
      wrong = `${input.labels[0].textContent.trim()}: give a number of at least ${input.min}.`;
  }
  form.querySelector("[data-error]").textContent = wrong;
  if (wrong) return;
  const found = calculate(values);
  for (const place of PLACES)
    for (const cell of form.querySelectorAll(`[data-place="${place}"]`))
      cell.textContent = found[place] ? found[place][cell.dataset.key].toFixed(2) : "–";
  for (const name of ["money", "energy"]) {
    const from = found.gpu_pays_from[name];
    form.querySelector(`[data-pays="${name}"]`).textContent =
      from === null
        ? `it saves no ${name} at any speed, since its start alone takes more`
        : `it saves ${name} from ${from.toFixed(1)} times the recorded machine's speed`;
  }
}

if (typeof document !== "undefined")
  document.addEventListener("DOMContentLoaded", () => {
    const form = document.querySelector("form.calculator");
    if (!form) return;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => showCalculator(form));
    form.addEventListener("reset", () => setTimeout(() => showCalculator(form)));
    showCalculator(form);
  });

// The theme's arrows that open a part of the contents have no words for a screen reader.
document.addEventListener("DOMContentLoaded", () => {
  for (const arrow of document.querySelectorAll(".has-children > details > summary"))
    arrow.setAttribute("aria-label", "Show or hide the pages below");
});

// A table that scrolls inside itself must be within reach of the keyboard.
function reachWideTables() {
  for (const table of document.querySelectorAll(".bd-article table"))
    if (table.scrollWidth > table.clientWidth) table.tabIndex = 0;
    else table.removeAttribute("tabindex");
}
window.addEventListener("load", reachWideTables);
window.addEventListener("resize", reachWideTables);

// A quiz shows its questions as they are: `x` becomes code here.
window.addEventListener("load", () => {
  for (const text of document.querySelectorAll(".bd-article .Quiz [id^=quizQn]"))
    if (text.textContent.includes("`"))
      text.innerHTML = text.innerHTML.replace(/`([^`]+)`/g, "<code>$1</code>");
});

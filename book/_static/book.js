// The theme's arrows that open a part of the contents have no words for a screen reader.
document.addEventListener("DOMContentLoaded", () => {
  for (const arrow of document.querySelectorAll(".has-children > details > summary"))
    arrow.setAttribute("aria-label", "Show or hide the pages below");
});

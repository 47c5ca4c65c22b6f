// What a reader would stumble over, one sentence for each finding. tools/book_check.py adds this
// to every page.
window.bookCheck = {
  // Language, heading order, words for pictures, mathematics and tables set, no markup left.
  problems() {
    const found = [];
    if (!document.documentElement.lang) found.push("no language");
    let level = 0;
    for (const h of document.querySelectorAll("article :is(h1, h2, h3, h4, h5, h6)")) {
      const now = +h.tagName[1];
      if (now > level + 1) found.push(`heading order: h${level} then h${now} "${h.textContent}"`);
      level = now;
    }
    if (document.querySelectorAll("article h1").length !== 1) found.push("not exactly one h1");
    for (const image of document.images)
      if (!image.hasAttribute("alt") || (image.closest("article") && !image.alt.trim()))
        found.push("no words for the picture " + image.src.slice(0, 80));
    if (document.querySelector("mjx-merror, [data-mjx-error]")) found.push("a formula is in error");
    const text = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
    while (text.nextNode()) {
      const data = text.currentNode.data, parent = text.currentNode.parentElement;
      const start = data.trim().slice(0, 60);
      if (parent.closest("pre, code, script, style")) continue;
      if (/\|[ :]*-{2,}[-:]* *\|/.test(data.replaceAll("—", "--")))
        found.push("a table is not set: " + start);
      if (parent.closest("mjx-container, .sig")) continue;
      if (/\\\(|\\\[/.test(data)) found.push("a formula is not set: " + start);
      if (/`|(^|\s)[*][*][A-Za-z]|\]\(/.test(data)) found.push("markup is shown: " + start);
    }
    for (const a of document.querySelectorAll("article a[href^=http]"))
      if (/[.](py|md|sh|json|yml|txt)$/.test(a.hostname))
        found.push("a file name became a web address: " + a.href);
    return found;
  },

  // What a reader at a desk would have to scroll sideways for: code in the text, printed output,
  // formulas. Code cells are left out: ruff holds them to 76 characters.
  cutOff() {
    return [...document.querySelectorAll("article pre, article div.math mjx-container")]
      .filter(e => e.offsetParent && !e.closest(".cell_input")
        && e.scrollWidth > e.clientWidth + (e.tagName === "PRE" ? 20 : 1))
      .map(e => `cut off by ${e.scrollWidth - e.clientWidth} px: `
        + (e.closest("div.math")?.id || e.textContent.trim().slice(0, 60)));
  },

  links() {
    return {
      ids: [...document.querySelectorAll("[id]")].map(e => e.id),
      links: [...new Set([...document.querySelectorAll("a[href]")].map(a => a.href))],
    };
  },

  // On a telephone: nothing wider than the screen, no squeezed note, no button off the screen.
  narrow() {
    const found = [], article = document.querySelector("article").clientWidth;
    const wide = document.documentElement.scrollWidth, page = document.documentElement.clientWidth;
    if (wide > page + 1) {
      const guilty = [...document.querySelectorAll("article *")]
        .filter(e => e.getBoundingClientRect().right > page + 1)
        .slice(0, 3).map(e => e.tagName.toLowerCase() + "." + e.className);
      found.push(`${wide} px wide on a screen of ${page}: ` + guilty.join(", "));
    }
    for (const note of document.querySelectorAll("article aside.margin"))
      if (note.offsetWidth < 0.8 * article) found.push("a margin note squeezes the text");
    for (const number of document.querySelectorAll("article div.math .eqno")) {
      const formula = number.parentElement.querySelector("mjx-container").getBoundingClientRect();
      if (formula.height && number.getBoundingClientRect().top < formula.bottom - 2)
        found.push("a number beside its formula: " + number.parentElement.id);
    }
    for (const button of document.querySelectorAll(".bd-header-article :is(button, label, a)")) {
      const box = button.getBoundingClientRect();
      if (box.width && getComputedStyle(button).visibility === "visible"
          && !button.closest(".dropdown-menu") && (box.left < 0 || box.right > innerWidth))
        found.push("a button off the screen: " + (button.title || button.className));
    }
    return found;
  },

  // axe-core's violations, of the rules in `only` or of all.
  async accessibility(only) {
    const options = {resultTypes: ["violations"], preload: false};
    if (only) options.runOnly = {type: "rule", values: only};
    return (await axe.run(document, options)).violations.map(v => ({
      id: v.id, impact: v.impact, count: v.nodes.length,
      first: v.nodes.slice(0, 2).map(n => n.target.join(" ") + " " + n.html.slice(0, 120)),
      why: (v.nodes[0].failureSummary || "").slice(0, 300)}));
  },
};

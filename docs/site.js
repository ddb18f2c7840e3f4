// Four things that the theme leaves out. Nothing is loaded, nothing is stored.

// a snippet of the search shows a short formula as plain text and a long one as "…", neither as TeX
if (typeof Search !== "undefined") {
  const signs = { cdot: "·", times: "×", le: "≤", ge: "≥", in: "∈" }, fonts = /\\(?:boldsymbol|mathbf|mathrm|mathcal|text)(?![a-zA-Z])\s*/g;
  const plain = (tex) => tex.trim().replace(/^\\[([]|\\[)\]]$/g, "").replace(fonts, "").replace(/\\(cdot|times|le|ge|in)(?![a-zA-Z])/g, (_, s) => signs[s]).replace(/[{}]/g, "");
  const whole = Search.htmlToText;
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    for (const math of page.querySelectorAll(".math")) {
      const text = plain(math.textContent);
      math.textContent = text.includes("\\") || text.length > 24 ? "…" : text;
    }
    return whole(page.documentElement.outerHTML, anchor);
  };
}

window.addEventListener("load", () => {
  // the navigation shows where one is
  const here = document.querySelector(".sidebar-tree .current-page"), pane = document.querySelector(".sidebar-scroll");
  if (here && pane) pane.scrollTop = here.offsetTop - pane.clientHeight / 3;

  // who comes from the search is led to the heading with the word, or to the word, and not to the top of a long page
  const article = document.querySelector("article");
  const arrive = (tries) => {
    const found = article.querySelector(":is(h2, h3, h4) .highlighted") || article.querySelector(".highlighted");
    if (!found) return tries && setTimeout(arrive, 100, tries - 1);  // words are marked a moment later
    let at = window.scrollY;
    const lead = () => {
      if (window.scrollY !== at) return;  // the reader has moved on
      window.scrollTo({ top: at + found.getBoundingClientRect().top - 70, behavior: "instant" });
      at = window.scrollY;
    };
    lead();
    window.MathJax?.startup?.promise?.then(lead);  // equations have moved it
  };
  if (article && !location.hash) arrive(10);

  // a figure that was made smaller to fit opens at its size
  for (const img of article?.querySelectorAll("img") ?? []) {
    if (img.closest("a") || img.naturalWidth < 1.5 * img.clientWidth) continue;
    img.style.cursor = "zoom-in";
    img.addEventListener("click", () => { location.href = img.src; });
  }
});

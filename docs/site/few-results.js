/* Search shows each page once, by its best place, and the best twenty pages: any common word is on most of them. */
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return; // only the page of results has it
  const PAGES = 20;
  const SCORE = 4; // of a result, beside its page, title, anchor, description, and file
  const search = Search._performSearch;
  Search._performSearch = (...query) => {
    const pages = new Map();
    for (const result of search(...query)) { // the best comes last
      const best = pages.get(result[0]);
      if (best === undefined || result[SCORE] >= best[SCORE]) pages.set(result[0], result);
    }
    return [...pages.values()].sort((a, b) => a[SCORE] - b[SCORE]).slice(-PAGES);
  };
});

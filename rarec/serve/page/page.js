// Everything that comes from the catalogue is put into the page as text, never as markup.

const byId = (id) => document.getElementById(id);
const history = [];
// Bundles may share the users of a service: all that this page shows is one user's, and so one bundle's.
const user = `page-${Math.random().toString(36).slice(2)}`;
let token = "";
let asked = 0;

class Refused extends Error {}

async function ask(path, body) {
  const headers = { "content-type": "application/json" };
  if (token) headers.authorization = `Bearer ${token}`;
  const options = body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify({ ...body, user }) };
  const response = await fetch(path, options);
  const said = await response.json();
  if (response.status === 401) byId("login").hidden = false;
  if (!response.ok) throw new Refused(`${said.problem}: ${said.remedy}`);
  return said;
}

function make(kind, text, fields = {}) {
  const element = Object.assign(document.createElement(kind), fields);
  if (text !== undefined) element.textContent = text;
  return element;
}

function say(place, error) {
  place.replaceChildren(make("span", error instanceof Refused ? error.message : `The service does not answer: ${error.message}`, { className: "wrong" }));
}

// ---- 1. the history

function showHistory() {
  byId("history").replaceChildren(...history.map((one, at) => {
    const row = make("li", one.title || one.item);
    const remove = make("button", "×", { type: "button" });
    remove.setAttribute("aria-label", `Remove ${one.title || one.item}`);
    remove.addEventListener("click", () => {
      history.splice(at, 1);
      showHistory();
      const left = byId("history").querySelectorAll("button");
      (left[Math.min(at, left.length - 1)] || byId("query")).focus();
    });
    row.append(" ", remove);
    return row;
  }));
  byId("empty").hidden = history.length > 0;
  recommend();
}

let typed;
byId("query").addEventListener("input", () => {
  clearTimeout(typed);
  typed = setTimeout(search, 150);
});

async function search() {
  const query = byId("query").value.trim();
  if (!query) return byId("found").replaceChildren();
  try {
    const said = await ask(`v1/items?limit=8&user=${user}&query=${encodeURIComponent(query)}`);
    if (query !== byId("query").value.trim()) return;
    byId("found").replaceChildren(...said.items.map((one) => {
      const row = make("li");
      const add = make("button", one.title || one.item, { type: "button" });
      add.addEventListener("click", () => {
        history.push(one);
        byId("query").value = "";
        byId("found").replaceChildren();
        byId("query").focus();
        showHistory();
      });
      row.append(add);
      return row;
    }));
    if (!said.items.length) byId("found").replaceChildren(make("li", "No title has all these words."));
  } catch (error) {
    say(byId("found"), error);
  }
}

// Down goes from the field into the results and on; up goes back; Enter in the field takes the first.
byId("query").addEventListener("keydown", (event) => {
  const first = byId("found").querySelector("button");
  if (event.key === "ArrowDown" && first) first.focus();
  else if (event.key === "Enter" && first) first.click();
  else return;
  event.preventDefault();
});
byId("found").addEventListener("keydown", (event) => {
  const all = [...byId("found").querySelectorAll("button")];
  const at = all.indexOf(document.activeElement);
  if (event.key === "ArrowDown") all[Math.min(at + 1, all.length - 1)].focus();
  else if (event.key === "ArrowUp") (at > 0 ? all[at - 1] : byId("query")).focus();
  else return;
  event.preventDefault();
});

byId("clear").addEventListener("click", () => {
  history.length = 0;
  showHistory();
});
byId("sample").addEventListener("click", async () => {
  try {
    const said = await ask(`v1/users/sample?user=${user}`);
    history.splice(0, history.length, ...said.items);
    showHistory();
  } catch (error) {
    say(byId("state"), error);
  }
});

// ---- 2. recommendations

async function recommend() {
  const turn = ++asked;
  const ids = history.map((one) => one.item);
  byId("why").replaceChildren();
  byId("state").textContent = "…";
  try {
    const [served, parts] = await Promise.all([
      ask("v1/recommend", { histories: [ids], k: 10 }),
      ask("v1/compare", { history: ids, k: 10 }).catch(() => ({ parts: {} })),
    ]);
    if (turn !== asked) return;
    const own = column("Served: all together", served.results[0].items, true);
    const others = Object.entries(parts.parts).map(([title, items]) => column(title, items, false));
    byId("served-items").replaceChildren(own);
    byId("columns").replaceChildren(...others);
    byId("state").textContent = "";
  } catch (error) {
    if (turn === asked) say(byId("state"), error);
  }
}

function column(title, items, explained) {
  const box = make("div");
  const list = make("ol");
  for (const one of items) {
    const row = make("li");
    if (explained) {
      const why = make("button", one.title || one.item, { type: "button" });
      why.setAttribute("aria-expanded", "false");
      why.addEventListener("click", () => explain(one, why));
      row.append(why);
    } else {
      row.textContent = one.title || one.item;
    }
    list.append(row);
  }
  box.append(make("h3", title), list);
  return box;
}

async function explain(one, button) {
  for (const other of document.querySelectorAll("[aria-expanded]")) other.setAttribute("aria-expanded", "false");
  button.setAttribute("aria-expanded", "true");
  try {
    const said = await ask("v1/explain", { history: history.map((each) => each.item), item: one.item });
    const most = Math.max(1e-9, ...Object.values(said.parts).map(Math.abs));
    const table = make("table");
    for (const [part, value] of Object.entries(said.parts).sort((a, b) => b[1] - a[1])) {
      const row = make("tr");
      const bar = make("meter", undefined, { min: 0, max: most, value: Math.max(0, value) });
      bar.setAttribute("aria-hidden", "true");
      const cell = make("td");
      cell.append(bar);
      row.append(make("th", part, { scope: "row" }), cell, make("td", `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`));
      table.append(row);
    }
    const near = said.nearest.length ? `Nearest in the history: ${said.nearest[0].title || said.nearest[0].item} (cosine ${said.nearest[0].score.toFixed(2)}).` : "";
    byId("why").replaceChildren(make("h3", `Why “${said.title || said.item}”?`), make("p", "What each part adds to its score, beside the average item:", { className: "hint" }), table, make("p", near));
  } catch (error) {
    say(byId("why"), error);
  }
}

// ---- 3. a new product

byId("new").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    const said = await ask("v1/items/place", {
      history: history.map((one) => one.item), title: byId("title").value, text: byId("text").value, k: 3,
    });
    const list = make("ol", undefined, { start: said.rank - said.above.length });
    for (const one of said.above) list.append(make("li", one.title || one.item));
    const own = make("li");
    own.append(make("strong", byId("title").value));
    list.append(own);
    for (const one of said.below) list.append(make("li", one.title || one.item));
    byId("place").replaceChildren(make("p", `Place ${said.rank.toLocaleString("en")} of ${said.of.toLocaleString("en")} for this user.`), list);
  } catch (error) {
    say(byId("place"), error);
  }
});

// ---- the start

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = byId("token").value.trim();
  byId("login").hidden = true;
  start();
});

async function start() {
  try {
    const { bundles } = await ask("v1/bundles");
    const rows = Object.entries(bundles).map(([name, one]) => `${name}: ${one.row}${one.version ? `, version ${one.version.slice(0, 12)}` : ""}`);
    byId("served").textContent = rows.join("; ");
    showHistory();
  } catch (error) {
    say(byId("served"), error);
  }
}

start();

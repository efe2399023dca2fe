// Everything that comes from the catalogue is put into the page as text, never as markup.

const byId = (id) => document.getElementById(id);
const history = [];
// Bundles may share the users of a service: all that this page shows is one user's, and so one bundle's.
const user = `page-${Math.random().toString(36).slice(2)}`;
// What the parts of a recommender say, in the words of a shop; parts of one's own keep their titles.
const REASONS = {
  "bought together (item-kNN)": "Customers who bought these buy it as well.",
  "bought next": "It is often bought soon after these.",
  EASE: "It goes with these products as a whole.",
  "similar words (TF-IDF)": "Its words are similar to theirs.",
  popularity: "It sells well.",
  "a new item": "It is new.",
  ID: "Customers with such purchases went on to buy it.",
};
const OF_TEXT = "Its description fits what was bought.";
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
  if (!response.ok) throw new Refused(response.status === 503 ? "Too much is asked just now: try again in a moment" : `${said.problem}: ${said.remedy}`);
  return said;
}

function make(kind, text, fields = {}) {
  const element = Object.assign(document.createElement(kind), fields);
  if (text !== undefined) element.textContent = text;
  return element;
}

const named = (one) => one.title || String(one.item);

function say(place, error) {
  const text = error instanceof Refused ? error.message : "The service cannot be reached: try again in a moment";
  place.replaceChildren(make("span", text, { className: "wrong" }));
}

// ---- what a customer has bought

function showHistory() {
  byId("history").replaceChildren(...history.map((one, at) => {
    const row = make("li", named(one));
    const remove = make("button", "×", { type: "button" });
    remove.setAttribute("aria-label", `Remove ${named(one)}`);
    remove.addEventListener("click", () => {
      history.splice(at, 1);
      showHistory();
      const left = byId("history").querySelectorAll("button");
      (left[Math.min(at, left.length - 1)] || byId("query")).focus();
    });
    row.append(remove);
    return row;
  }));
  byId("clear").hidden = history.length === 0;
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
    const said = await ask(`v1/items?limit=6&user=${user}&query=${encodeURIComponent(query)}`);
    if (query !== byId("query").value.trim()) return;
    byId("found").replaceChildren(...said.items.map((one) => {
      const row = make("li");
      const add = make("button", named(one), { type: "button" });
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
    if (!said.items.length) byId("found").replaceChildren(make("li", "No product has all these words."));
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
  byId("query").focus();
});
byId("sample").addEventListener("click", async () => {
  try {
    const said = await ask(`v1/users/sample?user=${user}`);
    history.splice(0, history.length, ...said.items);
    showHistory();
  } catch (error) {
    fail(error);
  }
});

// ---- what to show next

// What is on the page belongs to the history on it: where there is no answer, there is no list.
function show(items, parts) {
  byId("served-items").replaceChildren(...items.map((one) => {
    const row = make("li");
    const why = make("button", named(one), { type: "button" });
    why.setAttribute("aria-expanded", "false");
    why.addEventListener("click", () => explain(one, row, why));
    row.append(why);
    return row;
  }));
  byId("scores").replaceChildren(...items.map((one) => {
    const row = make("tr");
    row.append(make("td", String(one.item)), make("td", one.title), make("td", one.score.toFixed(4)));
    return row;
  }));
  byId("columns").replaceChildren(...Object.entries(parts).map(([title, own]) => {
    const box = make("div");
    const list = make("ol");
    list.append(...own.map((one) => make("li", named(one))));
    box.append(make("h3", `By “${title}” alone`), list);
    return box;
  }));
}

function fail(error) {
  show([], {});
  say(byId("state"), error);
}

async function recommend() {
  const turn = ++asked;
  const ids = history.map((one) => one.item);
  byId("state").textContent = "…";
  try {
    const said = await ask("v1/recommend", { histories: [ids], k: 10 });
    const parts = byId("more").open ? await partsOf(ids) : {};
    if (turn !== asked) return;
    show(said.results[0].items, parts);
    byId("state").textContent = ids.length ? "For this customer. Press one to see why." : "Nothing bought yet: these sell best.";
  } catch (error) {
    if (turn === asked) fail(error);
  }
}

const partsOf = (ids) => ask("v1/compare", { history: ids, k: 10 }).then((said) => said.parts, () => ({}));
byId("more").addEventListener("toggle", () => byId("more").open && !byId("columns").childElementCount && recommend());

async function explain(one, row, button) {
  const open = button.getAttribute("aria-expanded") === "true";
  for (const other of byId("served-items").querySelectorAll("button")) other.setAttribute("aria-expanded", "false");
  for (const other of byId("served-items").querySelectorAll("ul")) other.remove();
  if (open) return;
  button.setAttribute("aria-expanded", "true");
  const list = make("ul");
  row.append(list);
  try {
    list.append(...reasons(history.length ? await ask("v1/explain", { history: history.map((each) => each.item), item: one.item }) : null));
    byId("heard").textContent = [...list.children].map((each) => each.textContent).join(" ");
  } catch (error) {
    say(list, error);
  }
}

// The items of the history that are nearest, and the parts that speak for the item more than for an average one.
function reasons(said) {
  if (!said) return [make("li", "It is bought more often than most.")];
  const near = said.nearest.slice(0, 1).map((each) => `It is like “${named(each)}”.`);
  const parts = Object.entries(said.parts).filter(([, value]) => value > 0).sort((a, b) => b[1] - a[1]).slice(0, 2);
  return [...near, ...parts.map(([title]) => REASONS[title] || OF_TEXT)].map((text) => make("li", text));
}

// ---- a product that is not in the shop yet

byId("new").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    const said = await ask("v1/items/place", {
      history: history.map((one) => one.item), title: byId("title").value, text: byId("text").value, k: 3,
    });
    const list = make("ol", undefined, { start: said.rank - said.above.length });
    for (const one of said.above) list.append(make("li", named(one)));
    const own = make("li");
    own.append(make("strong", byId("title").value));
    list.append(own);
    for (const one of said.below) list.append(make("li", named(one)));
    byId("place").replaceChildren(make("p", `Place ${said.rank.toLocaleString("en")} of ${said.of.toLocaleString("en")} for this customer.`), list);
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
    fail(error);
  }
}

start();

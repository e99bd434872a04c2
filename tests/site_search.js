// Asks the search of a built site, in its own worker: node site_search.js SITE TERM...
// Prints a JSON object: term -> locations of the pages found, best first.
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const [site, ...terms] = process.argv.slice(2);
const folder = path.join(site, "assets/javascripts/workers");
const worker = fs.readdirSync(folder).find((name) => name.endsWith(".js"));
const index = JSON.parse(fs.readFileSync(path.join(site, "search/search_index.json")));

const handlers = [];
let answers = [];
const scope = {
  console,
  setTimeout,
  performance,
  URL,
  importScripts: () => {},
  postMessage: (message) => answers.push(message),
  addEventListener: (_, handler) => handlers.push(handler),
};
scope.self = scope;
scope.window = scope;
vm.createContext(scope);
vm.runInContext(fs.readFileSync(path.join(folder, worker), "utf8"), scope);

async function ask(type, data) {
  answers = [];
  for (const handler of handlers) await handler({ data: { type, data } });
  return answers;
}

(async () => {
  await ask(0, { config: index.config, docs: index.docs, options: {} });
  const found = {};
  for (const term of terms) {
    const [answer] = await ask(2, term);
    found[term] = answer.data.items.map(([first]) => first.location.split("#")[0]);
  }
  console.log(JSON.stringify(found));
})();

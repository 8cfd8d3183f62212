// The page at /docs: openapi.json, laid out for people.

const about = document.getElementById("about"), operations = document.getElementById("operations");

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

function describe(path, method, operation) {
  const details = document.createElement("details"), summary = document.createElement("summary");
  summary.append(element("span", method.toUpperCase(), "method"), element("code", path), ` ${operation.summary}`);
  details.append(summary);
  if (operation.description) details.append(element("p", operation.description));
  for (const parameter of operation.parameters ?? []) {
    details.append(element("p", `${parameter.name} (${parameter.in}): ${parameter.description ?? ""}`));
  }
  for (const [kind, body] of Object.entries(operation.requestBody?.content ?? {})) {
    details.append(element("p", `body, ${kind}`), element("pre", JSON.stringify(body.schema, null, 2)));
  }
  for (const [status, answer] of Object.entries(operation.responses)) {
    details.append(element("p", `${status}: ${answer.description}`));
  }
  return details;
}

const answer = await fetch("openapi.json");
const interface_ = await answer.json();
about.textContent = interface_.info.description;
for (const [path, item] of Object.entries(interface_.paths)) {
  for (const [method, operation] of Object.entries(item)) operations.append(describe(path, method, operation));
}

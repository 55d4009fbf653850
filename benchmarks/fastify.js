// What the service is held against: Fastify and better-sqlite3, one fsynced insert a request, the key checked.
// node fastify.js FOLDER_WITH_THE_PACKAGES DATABASE PORT KEY
const { createRequire } = require("node:module");
const { randomUUID } = require("node:crypto");
const [folder, database, port, key] = process.argv.slice(2);
const packages = createRequire(folder + "/package.json");
const db = new (packages("better-sqlite3"))(database);
db.pragma("journal_mode = WAL");
db.pragma("synchronous = FULL");
db.exec("CREATE TABLE workflow (number INTEGER PRIMARY KEY, id TEXT UNIQUE, status TEXT, created_at INTEGER, graph TEXT)");
const insert = db.prepare("INSERT INTO workflow (id, status, created_at, graph) VALUES (?, 'queued', ?, ?)");
const app = packages("fastify")();
app.addHook("onRequest", async (request, reply) => {
  if (request.url !== "/health" && request.headers["x-api-key"] !== key) return reply.code(401).send();
});
app.get("/health", async () => ({ status: "healthy" }));
app.post("/v1/comfyui/workflow", async (request, reply) => {
  const id = randomUUID(), createdAt = Date.now();
  insert.run(id, createdAt, JSON.stringify(request.body.workflow));
  return reply.code(202).send({ workflowId: id, status: "queued", queuePosition: 0, createdAt });
});
app.listen({ host: "127.0.0.1", port: Number(port) });

// Serves dist/ to this machine, with the headers that isolate the page from others: without them, a browser gives it no
// shared memory, and so one thread.
//
//     node serve.mjs [PORT]

import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname } from "node:path";
import { argv } from "node:process";
import { fileURLToPath } from "node:url";

export const DIST = new URL("dist/", import.meta.url);
const TYPES = { ".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm" };
const ISOLATION = { "cross-origin-opener-policy": "same-origin", "cross-origin-embedder-policy": "require-corp" };

/// A server on 127.0.0.1; `model`, a folder, is served as model/. Port 0 is one that is free.
export async function serve({ port = 0, isolated = true, model = null } = {}) {
    const server = createServer(async (request, response) => {
        const name = new URL(request.url, "http://localhost").pathname.slice(1) || "index.html";
        const file = model && name.startsWith("model/") ? new URL(name.slice(6), model) : new URL(name, DIST);
        const { size } = await stat(file).catch(() => ({}));
        // Only names without escapes; the parser of addresses has removed "..".
        if (size === undefined || !/^[\w./-]+$/.test(name)) {
            response.writeHead(404).end();
            return;
        }
        response.writeHead(200, {
            "content-type": TYPES[extname(name)] ?? "application/octet-stream",
            "content-length": size,
            ...(isolated ? ISOLATION : {}),
        });
        request.method === "HEAD" ? response.end() : createReadStream(file).pipe(response);
    });
    await new Promise((resolve, reject) => server.once("error", reject).listen(port, "127.0.0.1", resolve));
    return server;
}

if (argv[1] === fileURLToPath(import.meta.url)) {
    const server = await serve({ port: Number(argv[2] ?? 8000) });
    console.log(`http://localhost:${server.address().port}`);
}

// Serves dist/ on localhost, opens it in headless Chromium, and fails unless the page says that it passed.
//
//     node test.mjs [--screenshot FILE.png]
//
// The browser is driven by the DevTools protocol over a pipe: file descriptors 3 and 4, messages end with a zero byte.

import { spawn } from "node:child_process";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { extname, join } from "node:path";
import { argv, env, exit, getuid } from "node:process";

const DIST = new URL("dist/", import.meta.url);
const LIMIT_MS = 180_000;
const TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
};

async function answer(request, response) {
    const name = new URL(request.url, "http://localhost").pathname.slice(1) || "index.html";
    try {
        if (!/^[\w.-]+$/.test(name)) {
            throw new Error("only the files of the folder");
        }
        const body = await readFile(new URL(name, DIST));
        response.writeHead(200, { "content-type": TYPES[extname(name)] ?? "application/octet-stream" }).end(body);
    } catch {
        response.writeHead(404).end();
    }
}

/// Calls of DevTools methods, by the two ends of the pipe.
function connect(input, output) {
    const waiting = new Map();
    let [id, rest] = [0, ""];
    output.setEncoding("utf8");
    output.on("data", (text) => {
        const messages = (rest + text).split("\0");
        rest = messages.pop();
        for (const message of messages.map((message) => JSON.parse(message))) {
            if (message.method === "Runtime.exceptionThrown") {
                console.error(message.params.exceptionDetails);
            }
            const { resolve, reject } = waiting.get(message.id) ?? {};
            message.error ? reject?.(new Error(message.error.message)) : resolve?.(message.result);
        }
    });
    return (method, params = {}, sessionId = undefined) =>
        new Promise((resolve, reject) => {
            waiting.set(++id, { resolve, reject });
            input.write(`${JSON.stringify({ id, method, params, sessionId })}\0`);
        });
}

async function visit(call, url) {
    const { targetId } = await call("Target.createTarget", { url: "about:blank" });
    const { sessionId } = await call("Target.attachToTarget", { targetId, flatten: true });
    const page = (method, params) => call(method, params, sessionId);
    await page("Runtime.enable");
    await page("Page.navigate", { url });
    const text = async (script) => (await page("Runtime.evaluate", { expression: script })).result.value;
    const end = Date.now() + LIMIT_MS;
    let status = "";
    while (!/^(passed|failed)/.test(status)) {
        if (Date.now() > end) {
            throw new Error(`the page still says “${status}” after ${LIMIT_MS} ms`);
        }
        await new Promise((resolve) => setTimeout(resolve, 200));
        status = (await text("document.getElementById('status')?.textContent")) ?? "";
    }
    for (const id of ["layer", "checks", "times", "status"]) {
        console.log(await text(`document.getElementById("${id}").innerText`));
    }
    const bars = await text("document.querySelectorAll('#histogram rect').length");
    const at = argv.indexOf("--screenshot");
    if (at > 0) {
        const { data } = await page("Page.captureScreenshot", { captureBeyondViewport: true });
        await writeFile(argv[at + 1], Buffer.from(data, "base64"));
    }
    console.log(`bars in the histogram: ${bars}`);
    return status === "passed" && bars === 16;
}

const server = createServer(answer);
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const profile = await mkdtemp(join(tmpdir(), "nf4-web-"));
const browser = spawn(
    env.CHROMIUM ?? "chromium",
    [
        "--headless",
        "--window-size=900,1200",
        "--remote-debugging-pipe",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        `--user-data-dir=${profile}`,
        // Chromium does not start as root with its sandbox.
        ...(getuid() === 0 ? ["--no-sandbox"] : []),
    ],
    { stdio: ["ignore", "ignore", "ignore", "pipe", "pipe"] },
);
const [call, gone] = [
    connect(browser.stdio[3], browser.stdio[4]),
    new Promise((_, reject) => {
        browser.on("error", reject);
        browser.on("exit", (code, signal) => reject(new Error(`the browser ended: ${code ?? signal}`)));
    }),
];
let ok = false;
try {
    ok = await Promise.race([visit(call, `http://127.0.0.1:${server.address().port}/`), gone]);
} catch (error) {
    console.error(error);
}
gone.catch(() => {});
if (browser.exitCode === null) {
    const exited = new Promise((resolve) => browser.on("exit", resolve));
    browser.kill();
    await exited;
}
server.close();
await rm(profile, { recursive: true, force: true, maxRetries: 5 });
console.log(ok ? "passed" : "FAILED");
exit(ok ? 0 : 1);

// Tests dist/ on the tiny model of examples/llama, whose conversations are committed: `cargo test` there holds the native
// library to the same file. Each module in Node, then the page in headless Chromium.
//
//     node test.mjs [--screenshot FILE.png]

import assert from "node:assert/strict";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { extname, join } from "node:path";
import { argv } from "node:process";
import { fileURLToPath } from "node:url";

import { Browser } from "./browser.mjs";
import { Engine } from "./engine.mjs";

const DIST = new URL("dist/", import.meta.url);
const MODEL = new URL("../llama/tests/data/llama/", import.meta.url);
const EXPECTED = JSON.parse(await readFile(new URL("conversations.json", MODEL), "utf8"));
const MODEL_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"];
const ADAPTERS = ["adapter_one", "adapter_two"];
const TYPES = { ".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm" };

const path = (url) => fileURLToPath(url);

/// Every adapter's conversation, in both arithmetics, by the module alone.
async function testModule(name) {
    for (const arithmetic of Object.keys(EXPECTED.answers)) {
        const engine = await Engine.load(await WebAssembly.compile(await readFile(new URL(name, DIST))));
        const copy = async (folder, file) => engine.file(file, new Blob([await readFile(new URL(folder + file, MODEL))]));
        for (const file of MODEL_FILES) {
            await copy("", file);
        }
        const options = { quantize_head: false, f16_cache: false, ...EXPECTED.sampling };
        const { kernels } = engine.request({ load: { arithmetic, ...options } });
        for (const adapter of ADAPTERS) {
            await copy(`${adapter}/`, "adapter_config.json");
            await copy(`${adapter}/`, "adapter_model.safetensors");
            engine.request({ adapter: { name: adapter } });
        }
        for (const adapter of ["none", ...ADAPTERS, "none"]) {
            engine.request({ switch: { name: adapter === "none" ? null : adapter } });
            engine.request({ restart: {} });
            const answers = EXPECTED.questions.map((message) => {
                const { hash } = engine.request({ ask: { message } });
                let text = "";
                const step = () => engine.request({ step: { max_tokens: EXPECTED.max_tokens } }).text;
                for (let piece = step(); piece !== null; piece = step()) {
                    text += piece;
                }
                return { hash, text };
            });
            assert.deepEqual(answers, EXPECTED.answers[arithmetic][adapter], `${name}, ${arithmetic}, ${adapter}`);
        }
        assert.throws(() => engine.request({ switch: { name: "three" } }), /no adapter three/);
        console.log(`${name}: ${kernels} kernels, ${arithmetic}: the native conversations`);
    }
}

/// Serves the files of dist/, and under model/ those of the tiny model.
const serve = async (request, response) => {
    const name = new URL(request.url, "http://localhost").pathname.slice(1) || "index.html";
    try {
        assert.match(name, /^(model\/)?(adapter_\w+\/)?[\w.-]+$/);
        const file = name.startsWith("model/") ? new URL(name.slice(6), MODEL) : new URL(name, DIST);
        const body = await readFile(file);
        response.writeHead(200, {
            "content-type": TYPES[extname(name)] ?? "application/octet-stream",
        });
        response.end(request.method === "HEAD" ? undefined : body);
    } catch {
        response.writeHead(404).end();
    }
};

const IDLE = `!document.querySelector("#send").disabled`;

/// Asks the questions and compares hashes and texts with the native ones.
async function talk(page, adapter) {
    await page.fill("#adapter", adapter === "none" ? "" : adapter);
    await page.until(IDLE);
    await page.click("#restart");
    await page.until(`${IDLE} && !document.querySelector("#log > div")`);
    for (const question of EXPECTED.questions) {
        await page.fill("#message", question);
        await page.click("#send");
        await page.until(IDLE);
    }
    assert.equal(await page.text("#error"), "");
    const list = (selector) => page.get(`JSON.stringify([...document.querySelectorAll("${selector}")].map((e) => e.textContent))`);
    const texts = JSON.parse(await list("#log > .assistant"));
    const facts = JSON.parse(await list("#log > .facts"));
    const answers = texts.map((text, n) => ({ hash: facts[n].match(/first logits (\w{16})$/)?.[1], text }));
    assert.deepEqual(answers, EXPECTED.answers["16x4"][adapter], adapter);
    console.log(`page, ${adapter}: ${facts.join(" | ")}`);
}

/// Drops files, and expects a message.
async function refused(page, files, message) {
    await page.fill("#adapter", "");
    await page.drop("#drop", files);
    await page.until(`document.querySelector("#error").textContent !== "" && !document.querySelector("#files").disabled`);
    assert.match(await page.text("#error"), message);
    console.log(`refused: ${await page.text("#error")}`);
}

async function testPage(page) {
    const scratch = await mkdtemp(join(tmpdir(), "nf4-bad-"));
    const good = (name) => path(new URL(name, MODEL));
    const bad = async (name, content) => {
        await writeFile(join(scratch, name), content);
        return join(scratch, name);
    };
    const weights = await readFile(new URL("model.safetensors", MODEL));
    const texts = MODEL_FILES.slice(0, 3).map(good);
    await refused(page, [await bad("notes.txt", "hello")], /no config.json/);
    await refused(page, texts, /no model.safetensors/);
    await refused(page, [await bad("config.json", "{"), ...texts.slice(1), good("model.safetensors")], /config.json|JSON|EOF/);
    await refused(page, [...texts, await bad("model.safetensors", weights.subarray(0, 5000))], /model.safetensors/);
    await refused(page, [good("adapter_one")], /needs a model first|no model is loaded/);

    const { max_tokens, sampling } = EXPECTED;
    const fields = { "max-tokens": max_tokens, temperature: sampling.temperature, "top-p": sampling.top_p, seed: sampling.seed };
    for (const [id, value] of Object.entries(fields)) {
        await page.fill(`#${id}`, String(value));
    }
    await page.drop("#drop", [...MODEL_FILES.map(good), good("adapter_one")]);
    await page.until(`${IDLE} && !document.querySelector("#loaded").hidden`);
    assert.equal(await page.text("#error"), "");
    console.log(await page.text("#status"));
    assert.match(await page.text("#status"), /simd128/);
    const hash = EXPECTED.answers["16x4"].none[0].hash;
    assert.equal(await page.text("#hash"), hash);
    await page.fill("#native", hash);
    assert.match(await page.text("#same"), /the same bits/);
    await talk(page, "none");
    await talk(page, "adapter_one");
    await page.drop("#drop", [good("adapter_two")]);
    await page.until(`document.querySelectorAll("#adapter option").length === 3`);
    await page.until(IDLE);
    await talk(page, "adapter_two");
    await refused(page, [good("adapter_two")], /two adapters of the name adapter_two/);
    await talk(page, "none");
    const shot = argv.indexOf("--screenshot");
    if (shot > 0) {
        await writeFile(argv[shot + 1], await page.screenshot());
    }

    const origin = await page.get("location.origin");
    await page.fill("#url", `${origin}/model`);
    await page.click("#from-url button");
    await page.until(`document.querySelector("#files").disabled`);
    await page.until(IDLE);
    assert.equal(await page.text("#error"), "");
    assert.equal(await page.text("#hash"), hash);
    await page.fill("#url", `${origin}/model/adapter_two`);
    await page.click("#from-url button");
    await page.until(`document.querySelectorAll("#adapter option").length === 2`);
    await page.until(IDLE);
    await talk(page, "adapter_two");
    await rm(scratch, { recursive: true });
}

for (const name of ["nf4-simd128.wasm", "nf4-scalar.wasm"]) {
    await testModule(name);
}
const server = createServer(serve);
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const browser = await Browser.start();
try {
    await testPage(await browser.open(`http://127.0.0.1:${server.address().port}/`));
} finally {
    await browser.end();
    server.close();
}

// Tests dist/ on the tiny model of examples/llama, whose conversations are committed: `cargo test` there holds the native
// library to the same file. The module for one thread in Node, then the page in headless Chromium: isolated, with threads,
// and as any server of files gives it.
//
//     node test.mjs [--screenshot FILE.png]

import assert from "node:assert/strict";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { argv } from "node:process";
import { fileURLToPath } from "node:url";

import { Browser } from "./browser.mjs";
import { Engine } from "./engine.mjs";
import { DIST, serve } from "./serve.mjs";

const MODEL = new URL("../llama/tests/data/llama/", import.meta.url);
const EXPECTED = JSON.parse(await readFile(new URL("conversations.json", MODEL), "utf8"));
const MODEL_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"];
const ADAPTERS = ["adapter_one", "adapter_two"];

const path = (url) => fileURLToPath(url);

/// Every adapter's conversation, in each arithmetic, by the module alone.
async function testModule() {
    const module = await WebAssembly.compile(await readFile(new URL("nf4-simd128.wasm", DIST)));
    for (const arithmetic of Object.keys(EXPECTED.answers)) {
        const engine = await Engine.load(module);
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
            assert.deepEqual(answers, EXPECTED.answers[arithmetic][adapter], `${arithmetic}, ${adapter}`);
        }
        assert.throws(() => engine.request({ switch: { name: "three" } }), /no adapter three/);
        console.log(`module: ${kernels} kernels, ${arithmetic}: the native conversations`);
    }
}

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

const good = (name) => path(new URL(name, MODEL));

/// Files that are no model, or only part of one.
async function testRefusals(page) {
    const scratch = await mkdtemp(join(tmpdir(), "nf4-bad-"));
    const bad = async (name, content) => {
        await writeFile(join(scratch, name), content);
        return join(scratch, name);
    };
    const weights = await readFile(good("model.safetensors"));
    const texts = MODEL_FILES.slice(0, 3).map(good);
    await refused(page, [await bad("notes.txt", "hello")], /no config.json/);
    await refused(page, texts, /no model.safetensors/);
    await refused(page, [await bad("config.json", "{"), ...texts.slice(1), good("model.safetensors")], /config.json|JSON|EOF/);
    await refused(page, [...texts, await bad("model.safetensors", weights.subarray(0, 5000))], /model.safetensors/);
    await refused(page, [good("adapter_one")], /needs a model first|no model is loaded/);
    await rm(scratch, { recursive: true });
}

/// Sets the options of the expected conversations.
async function fillOptions(page) {
    const { max_tokens, sampling } = EXPECTED;
    const fields = { "max-tokens": max_tokens, temperature: sampling.temperature, "top-p": sampling.top_p, seed: sampling.seed };
    for (const [id, value] of Object.entries(fields)) {
        await page.fill(`#${id}`, String(value));
    }
}

/// Waits for a model, and compares what the page says of it.
async function loaded(page, status) {
    await page.until(`${IDLE} && !document.querySelector("#loaded").hidden`);
    assert.equal(await page.text("#error"), "");
    console.log(await page.text("#status"));
    assert.match(await page.text("#status"), status);
    assert.equal(await page.text("#hash"), EXPECTED.answers["16x4"].none[0].hash);
}

/// Loads from the server that the page is from.
async function loadUrl(page, folder) {
    await page.fill("#url", `${await page.get("location.origin")}/${folder}`);
    await page.click("#from-url button");
    await page.until(`document.querySelector("#files").disabled`);
    await page.until(IDLE);
}

/// An isolated page with three threads, whatever the machine has: dropped files, addresses, and adapters.
async function testThreads(page) {
    await testRefusals(page);
    await fillOptions(page);
    await page.fill("#threads", "3");
    await page.drop("#drop", [...MODEL_FILES.map(good), good("adapter_one")]);
    await loaded(page, /simd128, 3 threads,/);
    await page.fill("#native", await page.text("#hash"));
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
    await page.fill("#threads", "1");
    await loadUrl(page, "model");
    await loaded(page, /simd128, 1 thread,/);
    await loadUrl(page, "model/adapter_two");
    await talk(page, "adapter_two");
}

/// A page that may not have threads.
async function testPlain(page) {
    await fillOptions(page);
    assert.equal(await page.get(`document.querySelector("#threads").disabled`), true);
    await page.fill("#threads", "3");
    await loadUrl(page, "model");
    await loaded(page, /simd128, 1 thread, because the page is not isolated,/);
    await talk(page, "none");
}

await testModule();
const browser = await Browser.start();
try {
    for (const [isolated, test] of [[true, testThreads], [false, testPlain]]) {
        const server = await serve({ isolated, model: MODEL });
        await test(await browser.open(`http://127.0.0.1:${server.address().port}/`));
        server.close();
    }
} finally {
    await browser.end();
}

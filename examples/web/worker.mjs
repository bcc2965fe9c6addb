// Runs the model beside the page, which stays alive. Takes { id, method, argument } and answers { id, ok } or { id, error };
// before that, { id, event } for what comes bit by bit.

import { Engine } from "./engine.mjs";

/// What a model may have beside its weights.
const TEXTS = ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"];

let engine;
let stopped = false;

/// A function that gets a file of a folder, or null. A folder is { files: { NAME: Blob } } or { url }.
function reader({ files, url }) {
    if (files) {
        return async (name) => files[name] ?? null;
    }
    const base = new URL(url.endsWith("/") ? url : `${url}/`);
    return async (name) => {
        const response = await fetch(new URL(name, base)).catch(() => {
            throw new Error(`${base}${name} could not be read: no answer, or none that this page may see (CORS)`);
        });
        if (response.status === 404) {
            return null;
        }
        if (!response.ok) {
            throw new Error(`${base}${name}: ${response.status} ${response.statusText}`);
        }
        return response.blob();
    };
}

async function copy(get, name, needed = true) {
    const blob = await get(name);
    if (blob) {
        await engine.file(name, blob);
    } else if (needed) {
        throw new Error(`there is no ${name}`);
    }
}

/// The files with the weights.
async function shards(get) {
    if (await get("model.safetensors")) {
        return ["model.safetensors"];
    }
    const index = await get("model.safetensors.index.json");
    if (!index) {
        throw new Error("there is no model.safetensors, and no model.safetensors.index.json");
    }
    return engine.request({ shards: { index: await index.text() } });
}

/// Lets messages in, as that to stop. A timer would wait 4 ms.
function breathe() {
    return new Promise((resolve) => {
        const { port1, port2 } = new MessageChannel();
        port1.onmessage = () => {
            port1.close();
            resolve();
        };
        port2.postMessage(null);
    });
}

const methods = {
    async load({ folder, options, threads, test }, report) {
        const start = performance.now();
        engine = await Engine.best(threads);
        const get = reader(folder);
        for (const name of ["config.json", "tokenizer.json"]) {
            await copy(get, name);
        }
        for (const name of TEXTS) {
            await copy(get, name, false);
        }
        for (const name of await shards(get)) {
            report(`Reading ${name} …`);
            await copy(get, name);
        }
        report("Loading …");
        const about = engine.request({ load: options });
        const seconds = (performance.now() - start) / 1000;
        const { hash } = engine.request({ ask: { message: test } });
        engine.request({ restart: {} });
        return { ...about, seconds, hash };
    },

    async adapter({ name, folder }) {
        const get = reader(folder);
        await copy(get, "adapter_config.json");
        await copy(get, "adapter_model.safetensors");
        return engine.request({ adapter: { name } });
    },

    async ask({ message, maxTokens }, report) {
        stopped = false;
        const start = performance.now();
        const { tokens, hash } = engine.request({ ask: { message } });
        const read = performance.now();
        let decoded = 0;
        while (!stopped) {
            const step = engine.request({ step: { max_tokens: maxTokens } });
            decoded = step.decoded;
            if (step.text === null) {
                break;
            }
            report(step.text);
            await breathe();
        }
        const rate = (tokens, milliseconds) => (1000 * tokens) / Math.max(milliseconds, 1e-3);
        const end = performance.now();
        return { tokens, hash, decoded, prompt: rate(tokens, read - start), decoding: rate(decoded, end - read) };
    },

    async request(request) {
        return engine.request(request);
    },

    async stop() {
        stopped = true;
    },
};

onmessage = async ({ data: { id, method, argument } }) => {
    try {
        postMessage({ id, ok: await methods[method](argument, (event) => postMessage({ id, event })) });
    } catch (error) {
        // What a program cannot go on after, as an allocation that failed.
        const fatal = error instanceof WebAssembly.RuntimeError;
        postMessage({ id, error: fatal ? `the module ended (${error.message}): load the model again` : error.message });
    }
};

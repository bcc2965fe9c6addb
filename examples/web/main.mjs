// The page: takes files, shows what the model in the worker says.

import { chosenFiles, droppedFiles, sortFolders } from "./files.mjs";

/// Of which the page and the native program show the hash of the logits.
const TEST = "Why is the sky blue?";
const ARITHMETICS = ["16x4", "8x8", "f32"];

const element = (id) => document.getElementById(id);

/// The worker with the model, and calls of its methods.
class Remote {
    #worker = new Worker("worker.mjs", { type: "module" });
    #calls = new Map();
    #last = 0;

    constructor() {
        this.#worker.onmessage = ({ data: { id, ok, error, event } }) => {
            const { resolve, reject, report } = this.#calls.get(id);
            if (event !== undefined) {
                report?.(event);
                return;
            }
            this.#calls.delete(id);
            error === undefined ? resolve(ok) : reject(new Error(error));
        };
        this.#worker.onerror = (event) => {
            this.#calls.forEach(({ reject }) => reject(new Error(event.message ?? "the worker did not start")));
            this.#calls.clear();
        };
    }

    call(method, argument, report) {
        return new Promise((resolve, reject) => {
            this.#calls.set(++this.#last, { resolve, reject, report });
            this.#worker.postMessage({ id: this.#last, method, argument });
        });
    }

    /// Frees all its memory.
    end() {
        this.#worker.terminate();
    }
}

let remote = null;

/// Runs `work` with the controls off; what goes wrong is shown.
async function busy(work) {
    document.querySelectorAll("fieldset, #adapter, #restart, #send").forEach((control) => (control.disabled = true));
    element("error").textContent = "";
    try {
        await work();
    } catch (error) {
        element("error").textContent = error.message;
    }
    document.querySelectorAll("fieldset, #adapter, #restart, #send").forEach((control) => (control.disabled = false));
}

function count(number, noun) {
    return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

function status(text) {
    element("status").textContent = text;
}

function options() {
    return {
        arithmetic: element("arithmetic").value,
        quantize_head: element("quantize-head").checked,
        f16_cache: element("f16-cache").checked,
        temperature: element("temperature").valueAsNumber || 0,
        top_p: element("top-p").valueAsNumber || 1,
        seed: element("seed").valueAsNumber || 0,
    };
}

async function loadModel(folder) {
    remote?.end();
    remote = new Remote();
    element("loaded").hidden = true;
    status("Loading …");
    const chosen = options();
    try {
        const threads = element("threads").valueAsNumber || 1;
        const about = await remote.call("load", { folder, options: chosen, threads, test: TEST }, status);
        showModel(about, chosen);
    } catch (error) {
        status("No model.");
        throw error;
    }
}

function showModel(about, { arithmetic, quantize_head, f16_cache }) {
    const { layers, bytes, kernels, threads, positions, chat, seconds, hash } = about;
    status(
        `${count(layers, "layer")}, ${(bytes / 1e6).toFixed(1)} MB, ${positions} positions, kernels ${kernels}, ` +
            `${count(threads, "thread")}${crossOriginIsolated ? "" : ", because the page is not isolated"}, loaded in ${seconds.toFixed(1)} s` +
            (chat ? "" : "; the model has no chat template, so it continues texts"),
    );
    const flags = [`--arithmetic ${arithmetic}`];
    flags.push(...(quantize_head ? ["--head nf4"] : []), ...(f16_cache ? ["--cache f16"] : []));
    element("test-prompt").textContent = TEST;
    element("hash").textContent = hash;
    element("command").textContent = `llama MODEL --prompt '${TEST}' --max-tokens 1 ${flags.join(" ")}`;
    compare();
    element("adapter").replaceChildren(new Option("none", ""));
    element("log").replaceChildren();
    element("loaded").hidden = false;
}

/// Whether the native run has the same logits.
function compare() {
    const [ours, native] = [element("hash").textContent, element("native").value.trim()];
    element("same").textContent = native === "" ? "" : native === ours ? "✓ the same bits" : "✗ other bits";
    element("same").className = native === ours ? "equal" : "different";
}

async function addAdapter({ name, folder }) {
    if (!remote) {
        throw new Error("an adapter needs a model first");
    }
    await remote.call("adapter", { name, folder });
    element("adapter").add(new Option(name, name));
}

async function take({ model, adapters }) {
    if (model) {
        await loadModel(model);
    }
    for (const adapter of adapters) {
        await addAdapter(adapter);
    }
}

async function takeUrl(url) {
    // What stands there is seen by the name that adapters alone have.
    const base = url.endsWith("/") ? url : `${url}/`;
    const response = await fetch(new URL("adapter_config.json", base), { method: "HEAD" }).catch(() => null);
    const name = new URL(base).pathname.split("/").at(-2) || "adapter";
    await take(response?.ok ? { adapters: [{ name, folder: { url } }] } : { model: { url }, adapters: [] });
}

function bubble(kind, text) {
    const node = document.createElement("div");
    node.className = kind;
    node.textContent = text;
    element("log").append(node);
    return node;
}

async function say(message) {
    const user = bubble("user", message);
    const answer = bubble("assistant", "");
    const facts = bubble("facts", "…");
    element("stop").disabled = false;
    try {
        const report = (text) => {
            answer.append(text);
            answer.scrollIntoView({ block: "nearest" });
        };
        const result = await remote.call("ask", { message, maxTokens: element("max-tokens").valueAsNumber || 512 }, report);
        const { tokens, prompt, decoded, decoding, hash } = result;
        facts.textContent =
            `prompt: ${count(tokens, "new token")}, ${prompt.toFixed(1)} tokens/s; answer: ${count(decoded, "token")}, ` +
            `${decoding.toFixed(1)} tokens/s; first logits ${hash}`;
    } catch (error) {
        [user, answer, facts].forEach((node) => node.remove());
        element("message").value = message;
        throw error;
    } finally {
        element("stop").disabled = true;
    }
}

element("arithmetic").append(...ARITHMETICS.map((name) => new Option(name, name)));
// Only an isolated page may share memory between workers.
element("threads").value = crossOriginIsolated ? navigator.hardwareConcurrency : 1;
element("threads").disabled = !crossOriginIsolated;
element("native").oninput = compare;
const drop = element("drop");
addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
});
addEventListener("dragleave", () => drop.classList.remove("over"));
addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const files = droppedFiles(event.dataTransfer);
    busy(async () => take(sortFolders(await files)));
});
for (const id of ["pick", "pick-folder"]) {
    element(id).onchange = ({ target }) => {
        const files = chosenFiles(target.files);
        target.value = "";
        busy(async () => take(sortFolders(files)));
    };
}
element("from-url").onsubmit = (event) => {
    event.preventDefault();
    busy(() => takeUrl(element("url").value));
};
element("adapter").onchange = ({ target }) => {
    busy(() => remote.call("request", { switch: { name: target.value || null } }));
};
element("restart").onclick = () =>
    busy(async () => {
        await remote.call("request", { restart: {} });
        element("log").replaceChildren();
    });
element("stop").onclick = () => remote.call("stop");
element("say").onsubmit = (event) => {
    event.preventDefault();
    const message = element("message").value.trim();
    if (message) {
        element("message").value = "";
        busy(() => say(message)).then(() => element("message").focus());
    }
};

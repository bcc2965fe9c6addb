// Headless Chromium, driven by the DevTools protocol over a pipe: file descriptors 3 and 4, messages end with a zero byte.

import { spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { env, getuid } from "node:process";

export class Browser {
    #process;
    #profile;
    #waiting = new Map();
    #last = 0;
    #gone;

    static async start() {
        const browser = new Browser();
        browser.#profile = await mkdtemp(join(tmpdir(), "nf4-web-"));
        browser.#process = spawn(
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
                `--user-data-dir=${browser.#profile}`,
                // Chromium does not start as root with its sandbox.
                ...(getuid() === 0 ? ["--no-sandbox"] : []),
            ],
            { stdio: ["ignore", "ignore", "ignore", "pipe", "pipe"] },
        );
        browser.#gone = new Promise((_, reject) => {
            browser.#process.on("error", reject);
            browser.#process.on("exit", (code, signal) => reject(new Error(`the browser ended: ${code ?? signal}`)));
        });
        browser.#gone.catch(() => {});
        browser.#listen(browser.#process.stdio[4]);
        return browser;
    }

    #listen(output) {
        let rest = "";
        output.setEncoding("utf8");
        output.on("data", (text) => {
            const messages = (rest + text).split("\0");
            rest = messages.pop();
            for (const message of messages.map((message) => JSON.parse(message))) {
                if (message.method === "Runtime.exceptionThrown") {
                    console.error(message.params.exceptionDetails);
                }
                const { resolve, reject } = this.#waiting.get(message.id) ?? {};
                message.error ? reject?.(new Error(message.error.message)) : resolve?.(message.result);
            }
        });
    }

    #call(method, params = {}, sessionId = undefined) {
        const answer = new Promise((resolve, reject) => {
            this.#waiting.set(++this.#last, { resolve, reject });
            this.#process.stdio[3].write(`${JSON.stringify({ id: this.#last, method, params, sessionId })}\0`);
        });
        return Promise.race([answer, this.#gone]);
    }

    async open(url) {
        const { targetId } = await this.#call("Target.createTarget", { url: "about:blank" });
        const { sessionId } = await this.#call("Target.attachToTarget", { targetId, flatten: true });
        const page = new Page((method, params) => this.#call(method, params, sessionId));
        await page.call("Runtime.enable");
        await page.call("Page.enable");
        await page.call("Page.navigate", { url });
        await page.until(`document.readyState === "complete"`);
        return page;
    }

    async end() {
        if (this.#process.exitCode === null) {
            const exited = new Promise((resolve) => this.#process.on("exit", resolve));
            this.#process.kill();
            await exited;
        }
        await rm(this.#profile, { recursive: true, force: true, maxRetries: 5 });
    }
}

class Page {
    constructor(call) {
        this.call = call;
    }

    /// The value of an expression.
    async get(expression) {
        const { result, exceptionDetails } = await this.call("Runtime.evaluate", { expression });
        if (exceptionDetails) {
            throw new Error(`${expression}: ${exceptionDetails.exception?.description}`);
        }
        return result.value;
    }

    text(selector) {
        return this.get(`document.querySelector(${JSON.stringify(selector)}).textContent`);
    }

    /// Waits until an expression is true.
    async until(expression, limit = 120_000) {
        const end = Date.now() + limit;
        while (!(await this.get(expression))) {
            if (Date.now() > end) {
                throw new Error(`after ${limit} ms not yet: ${expression}\n${await this.get("document.body.innerText")}`);
            }
            await new Promise((resolve) => setTimeout(resolve, 100));
        }
    }

    /// Puts text into a field, as a user does.
    fill(selector, value) {
        return this.get(`(() => {
            const field = document.querySelector(${JSON.stringify(selector)});
            field.value = ${JSON.stringify(value)};
            field.dispatchEvent(new Event("input"));
            field.dispatchEvent(new Event("change"));
        })()`);
    }

    click(selector) {
        return this.get(`document.querySelector(${JSON.stringify(selector)}).click()`);
    }

    /// Drops files and folders of this machine on an element.
    async drop(selector, files) {
        const box = await this.get(`(() => {
            const { x, y, width, height } = document.querySelector(${JSON.stringify(selector)}).getBoundingClientRect();
            return JSON.stringify({ x: x + width / 2, y: y + height / 2 });
        })()`);
        const data = { items: [], files, dragOperationsMask: 1 };
        for (const type of ["dragEnter", "dragOver", "drop"]) {
            await this.call("Input.dispatchDragEvent", { type, ...JSON.parse(box), data });
        }
    }

    async screenshot() {
        const { data } = await this.call("Page.captureScreenshot", { captureBeyondViewport: true });
        return Buffer.from(data, "base64");
    }
}

// A page opened from disk (file:) may not start a worker, and the site's search is one. There its script runs in a
// hidden frame of the page instead; messages go both ways as a worker's do.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.inside.importScripts = (...others) => Promise.all(others.map((other) => this.run(other)));
      this.ready = this.run(address);
    }

    run(address) {
      const script = this.inside.document.createElement("script");
      script.src = new URL(address, location.href);
      return new Promise((resolve, reject) => {
        script.onload = resolve;
        script.onerror = () => reject(new Error(`${script.src} cannot be read`));
        this.inside.document.body.append(script);
      });
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}

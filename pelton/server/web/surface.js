// A canvas that is sharp on every screen, follows its size and the theme, and draws at most once a frame.

const NAMES = ["text", "muted", "line", "surface", "hover", "output", "prompt", "third", "wait", "danger", "line-strong"];
let colours = null;

/** The theme's colours as values that a canvas understands. */
export function palette() {
  if (colours) return colours;
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  colours = {};
  for (const name of NAMES) {
    probe.style.color = `var(--${name})`;
    colours[name] = getComputedStyle(probe).color;
  }
  colours.font = `11.5px ${getComputedStyle(document.documentElement).getPropertyValue("--sans")}`;
  probe.remove();
  return colours;
}

const surfaces = new WeakMap(); // canvas -> Surface: a canvas that has left the page is not kept

addEventListener("themechange", () => {
  colours = null;
  for (const canvas of document.querySelectorAll("canvas")) surfaces.get(canvas)?.redraw();
});

export class Surface {
  /** `draw(context, width, height)` in CSS pixels; it is not called while the canvas has no size. */
  constructor(canvas, draw) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.draw = draw;
    this.frame = 0;
    new ResizeObserver(() => this.redraw()).observe(canvas);
    surfaces.set(canvas, this);
  }

  redraw() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      const { canvas, context } = this;
      const { clientWidth: width, clientHeight: height } = canvas;
      if (!width || !height) return;
      const ratio = devicePixelRatio || 1;
      const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
      if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, width, height);
      context.font = palette().font;
      this.draw(context, width, height);
    });
  }
}

/** Calls `onmove(x, y)` while a pointer is over the canvas, `onmove(null)` when it leaves. */
export function hover(canvas, onmove) {
  canvas.addEventListener("pointermove", (event) => onmove(event.offsetX, event.offsetY));
  canvas.addEventListener("pointerdown", (event) => onmove(event.offsetX, event.offsetY));
  canvas.addEventListener("pointerleave", () => onmove(null));
}

/** Puts the tip beside the point and keeps it inside the plot. */
export function placeTip(tip, x, width) {
  tip.hidden = false;
  const room = tip.offsetWidth + 14;
  tip.style.transform = `translateX(${Math.round(x + room > width ? Math.max(0, x - room) : x + 14)}px)`;
}

// A plotly figure redrawn in place. Plotly comes from one shared model, evaluated once per page.

const KEY = "__adapmoe_lab_plotly";
const CONFIG = { displayModeBar: false, plotlyServerURL: "" };

async function evaluate(model) {
  const holder = await model.widget_manager.get_model(model.get("_program"));
  const source = `const module = { exports: {} }, exports = module.exports;
    ${holder.get("source")}
    export default module.exports;`;
  const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  try {
    return (await import(address)).default;
  } finally {
    URL.revokeObjectURL(address);
  }
}

async function plotly(model) {
  globalThis[KEY] ??= evaluate(model);
  try {
    return await globalThis[KEY];
  } catch (error) {
    delete globalThis[KEY];
    throw error;
  }
}

function render({ model, el }) {
  el.classList.add("live-figure");
  const content = () => JSON.parse(model.get("_content"));
  el.style.minHeight = `${content().layout.height ?? 450}px`;

  let frame = null;
  let drawn = false;
  const draw = async () => {
    const Plotly = await plotly(model);
    frame = null;
    if (!el.clientWidth) return; // hidden: drawn once it has a width
    const { data, layout } = content();
    el.style.minHeight = `${layout.height ?? 450}px`;
    await Plotly.react(el, data, layout, CONFIG);
    drawn = true;
  };
  const redraw = () => {
    frame ??= requestAnimationFrame(draw);
  };
  const resize = async () => {
    if (!drawn) redraw();
    else if (el.clientWidth) (await plotly(model)).Plots.resize(el);
  };
  const observer = new ResizeObserver(resize);
  observer.observe(el);
  model.on("change:_content", redraw);
  return async () => {
    observer.disconnect();
    model.off("change:_content", redraw);
    cancelAnimationFrame(frame);
    if (drawn) (await plotly(model)).purge(el);
  };
}

export default { render };

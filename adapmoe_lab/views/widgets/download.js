// A button that saves the bytes it was given, without any request.

function save(model) {
  const address = URL.createObjectURL(
    new Blob([model.get("content")], { type: "application/octet-stream" }),
  );
  const anchor = document.createElement("a");
  anchor.href = address;
  anchor.download = model.get("filename");
  document.body.append(anchor);
  anchor.click();
  anchor.remove();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

function render({ model, el }) {
  const button = document.createElement("button");
  button.className = "jupyter-widgets jupyter-button widget-button";
  button.style.width = "auto";
  const icon = document.createElement("i");
  icon.className = "fa fa-download";
  icon.style.marginRight = "4px";
  const text = document.createElement("span");
  button.append(icon, text);
  button.addEventListener("click", () => save(model));
  const draw = () => {
    text.textContent = model.get("description");
    button.title = model.get("filename");
    button.disabled = model.get("disabled");
  };
  model.on("change", draw);
  draw();
  el.append(button);
  return () => model.off("change", draw);
}

export default { render };

"""The whole way from the demo model to a config that runs; a script for an installed project."""

import adapmoe_lab as lab

PROMPT = "Once upon a time, there was a little"

model = lab.load("demo", dtype="float32", link="none")
texts = lab.calibration_texts()[:8]
trace = lab.profile(model, texts, project="project")
sensitivity = lab.sensitivity(model, texts)
hardware = lab.probe_hardware(model, rounds=3)
config = lab.tune(
    trace,
    sensitivity,
    hardware,
    expert_memory="50%",
    skipped_fraction=0.1,
    model=model,
    texts=texts[:2],
)
config.save("tuned.json")

tuned = lab.load("demo", dtype="float32", link="none", config="tuned.json")
assert tuned.config.gating.fingerprint() == config.gating.fingerprint()
assert tuned.engine.plan.n_slots < model.engine.plan.n_slots
written = tuned.generate(PROMPT, max_new_tokens=8)
assert written.startswith(PROMPT)
assert len(written) > len(PROMPT)

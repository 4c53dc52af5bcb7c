"""The plot of a training run's losses."""

from plumbing.files import complete


def plot_losses(records, path, floor=None):
    """Draws the losses of a log's records as a PNG, in bits per byte; in nats without any validation.

    floor: the bits per byte that no model can beat on average; None: it isn't known.
    """
    trained = [record for record in records if record["loss"] is not None]
    evaluated = [record for record in records if record.get("val_loss") is not None]
    if not trained:  # Somebody has removed the log, or no step had a target.
        return
    from matplotlib.figure import Figure  # Nothing else needs it.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    scale = 1
    best = min(record["loss"] for record in trained)
    if evaluated:
        last = evaluated[-1]
        scale = last["val_bpb"] / max(last["val_loss"], 1e-9)  # so many bits per byte a nat per token
        best = min(record["val_bpb"] for record in evaluated)
    axes.plot([record["step"] for record in trained], [record["loss"] * scale for record in trained],
              color="#9ecae1", linewidth=1, label="train")
    if evaluated:
        axes.plot([record["step"] for record in evaluated], [record["val_bpb"] for record in evaluated],
                  color="#08519c", marker="o", label=f"validation, {last['val_bpb']:.3f} at the end")
    if evaluated and floor is not None:
        axes.axhline(floor, color="#d62728", linestyle="--",
                     label=f"entropy of the stories, {floor:.3f}")
    # After a twentieth of its steps a model from scratch has fallen from a height that would dwarf the rest.
    top = trained[len(trained) // 20]["loss"] * scale
    axes.set(xlabel="step", ylabel="bits per byte" if evaluated else "nats per token",
             xlim=(0, records[-1]["step"]), ylim=(0, max(top, 4 * best, 1e-9)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with complete(path) as file:
        figure.savefig(file, format="png", dpi=150)

"""TensorBoard's custom scalars page: the monitor's records of AdamW and of StoSignSGD in the same panels."""

from lightning_stosign._tags import LAYER_PREFIX, PREFIX

Panels = dict[str, dict[str, list[object]]]

_DENOMINATOR = "(max_exp_avg_sq|exp_avg_sq|exp_inf)"


def scalars_layout() -> Panels:
    """Return the layout for ``SummaryWriter.add_custom_scalars``.

    Its charts draw every run that is selected, and their tags are regular expressions: the second moment of an AdamW
    run and the envelope of a StoSignSGD run, which play the same part, fall into one chart. The charts that show a
    collapse come first: TensorBoard opens the first category, four charts in a row.
    """
    number = r"(\d+-\w+/)?"  # with or without the number and name of one of several optimizers
    one = f"{PREFIX}/{number}"

    def chart(*patterns: str) -> list[object]:
        return ["Multiline", list(patterns)]

    def by_layer(statistic: str, state: str) -> list[object]:
        # The second is for old_tags=True.
        return chart(f"{LAYER_PREFIX}{statistic}/{number}{state}.+", f"{one}{statistic}/{state}.+")

    return {
        "AdamW and StoSignSGD": {
            "denominator: share of zeros": chart(f"{one}zero_fraction/{_DENOMINATOR}$"),
            "coordinates that explode": chart(f"{one}exploding_fraction$"),
            "coordinates that are dead": chart(f"{one}dead_fraction$"),
            "loss": chart(".*loss.*"),
            "step: RMS of the update": chart(f"{one}update_rms$"),
            "momentum: share of zeros": chart(f"{one}zero_fraction/exp_avg$"),
            "denominator: share that a format would lose": chart(f"{one}underflow_fraction/{_DENOMINATOR}/[^/]+$"),
            "momentum: share that a format would lose": chart(f"{one}underflow_fraction/exp_avg/[^/]+$"),
            "denominator: share whose change a format would lose": chart(
                f"{one}stalled_fraction/{_DENOMINATOR}/[^/]+$"
            ),
            "step: noise of the random sign": chart(f"{one}(noise_rms|sign_agreement)$"),
            "gradient: largest magnitude": chart(f"{one}grad_abs_max$"),
        },
        "Layer by layer": {
            "denominator: share of zeros": by_layer("zero_fraction", f"{_DENOMINATOR}/"),
            "momentum: share of zeros": by_layer("zero_fraction", "exp_avg/"),
            "coordinates that explode": by_layer("exploding_fraction", ""),
        },
    }

"""The GPU report: it says that there is no GPU, and its table can be made on any device."""

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_machine_without_a_gpu_gets_one_line_and_exit_code_2(tmp_path, capsys):
    from gpu_report import main

    with pytest.raises(SystemExit) as ended:
        main(tmp_path / "report.md")
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "no CUDA or ROCm GPU: nothing to report\n")
    assert not (tmp_path / "report.md").exists()


def test_table_has_a_row_for_each_optimizer():
    from gpu_report import compared, machine, rows, table

    makes = {name: make for name, make in compared().items() if name.startswith(("AdamW", "StoSignSGD, f"))}
    found = rows(makes, [(64, 96), (96,)], rounds=2, device="cpu")
    text = table(found)
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == list(makes)
    by_name = {row[0]: row for row in found}
    assert by_name["StoSignSGD, fp8-raw"][4] < by_name["StoSignSGD, float32"][4] == 8
    assert torch.__version__ in machine("cpu")

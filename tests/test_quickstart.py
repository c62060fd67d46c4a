"""The whole road in one shell, as a newcomer types it: prepare, SFT, evaluate, OFFLOAD_FOLDER, KD, DPO, serve."""

import json
import os
import sys

from serving import Server

RECIPE = """
set -e
python creditmix_prepare.py --src data/creditmix_dataset.json --outdir $HERE/data
train="--student $STUDENT --max_steps 2 --batch_size 8 --micro_batch 4 --lr 0.01 --dev_rows 8"
python sft_train.py $train --data $HERE/data/creditmix_sft.jsonl --save_dir $HERE/creditmix_sft
python eval_creditmix.py --model_dir $STUDENT $HERE/creditmix_sft --val_per_class 4 --out $HERE/report
export OFFLOAD_FOLDER=$HERE/offload
python infer_creditmix.py --model_dir $HERE/creditmix_sft --features "Age: 23.0" > $HERE/answer.json
python kd_train.py $train --data $HERE/data/creditmix_kd.jsonl --save_dir $HERE/creditmix_kd
python dpo_train.py $train --data $HERE/data/creditmix_dpo.jsonl --save_dir $HERE/creditmix_dpo \\
  --init_adapter $HERE/creditmix_sft
exec python -m uvicorn serve_creditmix:app --port $PORT
"""


def test_one_shell_from_prepare_to_three_served_adapters(tiny, tmp_path):
    folders = {f"{name.upper()}_DIR": str(tmp_path / f"creditmix_{name}") for name in ("sft", "kd", "dpo")}
    env = {**folders, "STUDENT": str(tiny), "BASE_MODEL": str(tiny), "HERE": str(tmp_path)}
    env |= {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    server = Server(tmp_path, ready=False, command=["bash", "-c", RECIPE], **env)
    with server:
        server.wait(seconds=600)
        for model in ("base", "sft", "kd", "dpo"):
            status, answer, _ = server.infer(model, "Age: 23.0")
            assert status == 200 and answer["model_name"] == model
        once = json.loads((tmp_path / "answer.json").read_text())
        served = server.infer("sft", "Age: 23.0")[1]
        assert served["prediction"] == once["prediction"]
    log = server.log.read_text()
    assert log.count("OFFLOAD_FOLDER is not used in training") == 2
    assert json.loads((tmp_path / "report" / "report.json").read_text())["n"] == 12

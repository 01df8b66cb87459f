"""``lungseg synthesize``: patches drawn from a trained model, in a patch store of the usual layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lungseg.config.execution import Execution, resolve_device
from lungseg.config.fields import to_dict
from lungseg.config.synthesize import SynthesizeConfig
from lungseg.diffusion.checkpoint import Student, load_student
from lungseg.diffusion.sampling import sample_ddpm, sample_dpm_solver
from lungseg.scan.volume import Geometry
from lungseg.stages.cohort import DONE, SKIPPED, CaseOutcome, StageResult, limited_threads
from lungseg.stages.fits import find_model
from lungseg.stages.progress import progress
from lungseg.stages.sample_pictures import real_patches, summarised
from lungseg.store.cases import Store
from lungseg.store.locks import lock
from lungseg.store.schema import make_provenance, write_artefact
from lungseg.tissue import LUNG_LEFT


def synthesize(
    model: Path | str,
    output: Path,
    config: SynthesizeConfig = SynthesizeConfig(),
    *,
    real: Path | None = None,
    as_json: bool = False,
    execution: Execution = Execution(),
) -> StageResult:
    """Draw ``config.num`` patches, one case each, conditioned on a patch that is all lung.

    Patch i depends on the model, the seed and i only; complete ones are kept, so the same call resumes. The picture
    ``samples.png`` in ``output`` shows some of them.

    Parameters
    ----------
    model, output : path
        Training run or its ``model.safetensors``; store of the patches.
    config : SynthesizeConfig
    real : path, optional
        Patch store: as many of its patches, picked by the seed among those with most lung, are shown and counted
        beside the drawn ones.
    as_json : bool
        The result's document holds what became of each patch and the Hounsfield units of all.

    Raises
    ------
    UsageError
        If more solver steps are asked for than the diffusion has.
    MismatchError
        If ``output`` holds patches of another model or other settings, ``real`` those of another size or spacing, or
        the model has no decoder.
    """
    device = resolve_device(execution.device)
    student = load_student(find_model(Path(model)), device=device)
    student.require_decoder("synthesize")
    spacing = float(student.card["spacing_mm"])
    patch = student.config.patch_size
    beside = real_patches(Store(Path(real)), patch, spacing, num=config.num, seed=config.seed) if real else None
    shared = {"spacing_mm": spacing, "patch_size": list(patch), "salt": ""}
    replace = execution.overwrite
    made_by = "synthetic: drawn from a model"
    store = Store.create(Path(output), config=shared, salt="synthetic", provenance=made_by, overwrite=replace)
    settings = {key: value for key, value in to_dict(config).items() if key not in ("num", "batch_size")}
    outcomes = []
    with progress("synthesize", config.num, execution, unit="patches") as advance, limited_threads(execution.threads):
        for start in range(0, config.num, config.batch_size):
            indices = list(range(start, min(start + config.batch_size, config.num)))
            # the whole batch is drawn even if one patch is missing: a convolution's last bits depend on the batch
            wanted = make_provenance("synthesize", settings, inputs={"model": student.fingerprint}, synthetic=True)
            missing = [i for i in indices if not store.is_done(_path(store, i), "volume", wanted, overwrite=replace)]
            drawn = _draw(student, indices, config, device) if missing else np.zeros((len(indices), *patch), np.int16)
            for i, image in zip(indices, drawn, strict=True):
                if i in missing:
                    with lock(store.lock_file(_case_id(i), "synthesize")):
                        _write(store, i, image, wanted, spacing)
                outcomes.append(CaseOutcome(_case_id(i), DONE if i in missing else SKIPPED))
            advance(len(indices), "")
    return summarised(store, outcomes, beside, spacing, as_json=as_json)


def _case_id(index: int) -> str:
    return f"synthetic-{index:06d}"


def _path(store: Store, index: int) -> Path:
    return store.case_file(_case_id(index), "volume")


def _draw(student: Student, indices: list[int], config: SynthesizeConfig, device: str) -> np.ndarray:
    """Patches int16 HU, shape (n, D, H, W)."""
    patch, T = student.config.patch_size, student.schedule.num_steps
    mask = torch.ones((len(indices), *patch), device=device)

    def noise_at(t: int) -> torch.Tensor:
        planes = [
            np.random.Generator(np.random.Philox(key=[config.seed, i * 2**32 + t])).standard_normal(patch, np.float32)
            for i in indices
        ]
        return torch.from_numpy(np.stack(planes)).to(device)

    def predict_x_0(x_t: torch.Tensor, t: int) -> torch.Tensor:
        times = torch.full((len(indices),), t, device=device)
        output = student.unet(torch.stack([x_t, mask], dim=1), times)[0][:, 0]
        return student.schedule.to_x_0(x_t, output, times, student.config.prediction)

    with torch.no_grad():
        if config.sampler == "ddpm":
            x_0 = sample_ddpm(predict_x_0, student.schedule, noise_at)
        else:
            x_0 = sample_dpm_solver(predict_x_0, student.schedule, noise_at(T), steps=config.steps)
    return student.window.denormalise(x_0.clamp(-1, 1)).round().to(torch.int16).cpu().numpy()


def _write(store: Store, index: int, image: np.ndarray, provenance: dict[str, object], spacing: float) -> None:
    """One patch as a case, laid out like a scan; its mask is all lung, on no particular side."""
    grid = Geometry(image.shape, (spacing,) * 3)
    mask = np.full(image.shape, LUNG_LEFT, dtype=np.uint8)
    datasets = {
        "image": image,
        "mask": mask,
        "patches/corner": np.zeros((1, 3), dtype=np.int32),
        "patches/mask_fraction": np.ones(1, dtype=np.float32),
    }
    facts = {
        "case_id": _case_id(index),
        "patient_id": _case_id(index),
        "split": "",
        "inspiration": "",
        "acquisition": {},
        "warnings": ["synthetic: drawn from a model, of no patient"],
        "grid": grid.to_dict(),
        "source": {
            "grid": grid.to_dict(),
            "full_grid": grid.to_dict(),
            "crop_start": [0, 0, 0],
            "stored_axes": [0, 1, 2],
            "stored_flips": [False, False, False],
        },
        "lung_volume_ml": round(float(np.prod(image.shape)) * grid.voxel_ml, 3),
        "lung_median_hu": float(np.median(image)),
    }
    unit = {"image": {"unit": "HU", "spacing_mm": [spacing] * 3}}
    write_artefact(_path(store, index), "volume", datasets, provenance={**provenance, **facts}, attributes=unit)

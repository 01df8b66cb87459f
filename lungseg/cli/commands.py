"""The commands: what each takes, in one table."""

from __future__ import annotations

from lungseg.cli.options import Command, PathOption
from lungseg.config.benchmark import BenchmarkConfig
from lungseg.config.cluster import ClusterConfig
from lungseg.config.evaluate import EvaluateConfig
from lungseg.config.export_model import ExportModelConfig
from lungseg.config.extract_radiomics import RadiomicsConfig
from lungseg.config.phantom import PhantomConfig
from lungseg.config.preprocess import PreprocessConfig
from lungseg.config.probe import ProbeConfig
from lungseg.config.refine import RefineConfig
from lungseg.config.report import ReportConfig
from lungseg.config.run import RunConfig
from lungseg.config.synthesize import SynthesizeConfig
from lungseg.config.train_ddpm import TrainConfig
from lungseg.tissue import LABEL_CONVENTIONS

_SAYING = ("quiet", "verbose")
_JSON = PathOption("as_json", "JSON instead of tables.", ("--json",), switch=True)
_LOBES = PathOption(
    "lobe_mask", "Lobe mask of the case, or folder of <case_id>.nii.gz: numbers per lobe.", ("--lobe-mask",)
)
_PICTURES = PathOption(
    "pictures",
    "Training run, fits/<name> or store of `synthesize` whose pictures the page shows; repeatable.",
    ("--pictures",),
    many=True,
)
_STORE = PathOption("store", "Patch store made by `lungseg preprocess`.", required=True)
_SCANS = PathOption("scans", "DICOM folders, zip archives, NIfTI, NRRD and MHA files, or folders of them.", many=True)
_SERIES = PathOption(
    "series",
    "Key (of --list) or UID of a series to take in place of the best one; repeatable.",
    ("--series",),
    words=True,
)
_LUNG_MASK = PathOption(
    "lung_mask",
    "Lungs from a mask, a folder of masks named <case_id> or like the scans, or the package lungmask (that word).",
    ("--lung-mask",),
)


def _output(doc: str, *, required: bool = True) -> PathOption:
    return PathOption("output", doc, ("--output", "-o"), required=required)


COMMANDS: tuple[Command, ...] = (
    Command(
        "preprocess",
        "lungseg.stages.preprocess:preprocess_command",
        "Scans in, a patch store out: geometry checked, lungs found, one HDF5 file per scan.",
        (
            _SCANS,
            _output("Patch store to make or to add to; needed but for --list and --check.", required=False),
            PathOption(
                "list_scans", "Show the series found and which are taken, from headers alone.", ("--list",), switch=True
            ),
            PathOption(
                "check",
                "Judge every scan as a real run would, and estimate it; writes nothing.",
                ("--check",),
                switch=True,
            ),
            PathOption("as_json", "With --list or --check: JSON instead of tables.", ("--json",), switch=True),
            _SERIES,
            PathOption(
                "manifest", "CSV: path, series, case_id, patient_id, split, reference, inspiration.", ("--manifest",)
            ),
            PathOption("id_map", "CSV (mode 0600) linking case ids to sources; keep it private.", ("--id-map",)),
            _LUNG_MASK,
        ),
        PreprocessConfig,
        (
            "lungseg preprocess dicom/ --check --jobs 4",
            "lungseg preprocess dicom/ -o cohort --id-map ids.csv --jobs 4",
        ),
        ("jobs", "shard", "overwrite", "dry_run", *_SAYING),
        check="lungseg.config.preprocess:check_modes",
    ),
    Command(
        "extract-radiomics",
        "lungseg.stages.extract_radiomics:extract_radiomics",
        "The 34 radiomic descriptors of windows of every lung, and their standardisation for training.",
        (_STORE,),
        RadiomicsConfig,
        ("lungseg extract-radiomics cohort", "lungseg extract-radiomics cohort --backend pyradiomics --jobs 8"),
    ),
    Command(
        "train-ddpm",
        "lungseg.stages.train_ddpm:train_ddpm",
        "Train the diffusion model, taught by radiomics. The same command resumes; --dry-run tells its needs.",
        (
            _STORE,
            _output("Folder of the training run."),
            _JSON,
        ),
        TrainConfig,
        (
            "lungseg train-ddpm cohort -o run --preset small",
            "lungseg train-ddpm cohort -o run --gpus 4 --batch-size 64 --workers 8",
        ),
        ("device", "gpus", "threads", "dry_run", *_SAYING),
        estimate="lungseg.stages.training_estimate:estimate",
    ),
    Command(
        "synthesize",
        "lungseg.stages.synthesize:synthesize",
        "Draw patches from a trained model into a new patch store.",
        (
            PathOption("model", "Training run, or its model.safetensors.", required=True),
            _output("Store of the patches."),
            PathOption("real", "Patch store of real scans, shown beside the drawn patches.", ("--real",)),
            _JSON,
        ),
        SynthesizeConfig,
        (
            "lungseg synthesize run -o synthetic -n 64 --real cohort",
            "lungseg synthesize model.safetensors -o synthetic -n 1000 --sampler ddpm --device cuda",
        ),
        ("device", "overwrite", "dry_run", *_SAYING),
    ),
    Command(
        "probe",
        "lungseg.stages.probe:probe",
        "Score every noise level and block of a model without labels, to choose features for `cluster`.",
        (
            PathOption("model", "Training run, model.safetensors, or bundle.", required=True),
            _STORE,
            PathOption("output", "JSON file to write.", ("--output", "-o")),
            PathOption("as_json", "Print JSON instead of the table.", ("--json",), switch=True),
        ),
        ProbeConfig,
        ("lungseg probe run cohort", "lungseg probe run cohort --timesteps 0,10,25 --blocks encoder.2.0,middle --json"),
        ("device", "jobs", "dry_run", *_SAYING),
    ),
    Command(
        "export-model",
        "lungseg.stages.export_model:export_model",
        "A trained model as the small file that is shared: for features, in half precision, with its model card.",
        (
            PathOption("model", "Training run, model.safetensors, or bundle (which keeps its fit).", required=True),
            _output("File to write."),
            PathOption("card", "TOML: name, data, seeds, licence, limits, table figures.", ("--card",)),
        ),
        ExportModelConfig,
        (
            "lungseg export-model run -o lungs.safetensors --card card.toml",
            "lungseg export-model run -o whole.safetensors --decoder --precision fp32",
        ),
        ("overwrite", "dry_run", *_SAYING),
    ),
    Command(
        "cluster",
        "lungseg.stages.cluster:cluster",
        "Tokens by the method asked for, one clustering over the cohort, and a name for each component.",
        (
            _STORE,
            PathOption(
                "model",
                "Training run, model.safetensors, bundle, or `starter`: the shipped model; some methods need none.",
                ("--model",),
            ),
            PathOption("fit", "Apply this fit (bundle, or fits/<name> of a store) instead of fitting.", ("--fit",)),
            PathOption(
                "bundle", "Also write model and fit into this one file, for `lungseg run --model`.", ("--bundle",)
            ),
            PathOption("fit_only", "Fit and stop; do not apply to the cases.", ("--fit-only",), switch=True),
            _JSON,
        ),
        ClusterConfig,
        (
            "lungseg cluster cohort --model run --bundle bundle.safetensors",
            "lungseg cluster new --method radiomics --fit cohort/fits/radiomics",
        ),
    ),
    Command(
        "refine",
        "lungseg.stages.refine:refine",
        "Posteriors to contours: label maps, and on request files, numbers and pictures for each scan.",
        (
            _STORE,
            PathOption("export", "Write NIfTI on the scan's grid, numbers and PNG here.", ("--export",)),
            _LOBES,
            PathOption("dicom_seg", "Write <case_id>.seg.dcm too; needs --source.", ("--dicom-seg",), switch=True),
            PathOption(
                "dicom_sr",
                "Write the numbers as <case_id>.sr.dcm; needs --dicom-seg.",
                ("--dicom-sr",),
                switch=True,
            ),
            PathOption("source", "Folder with the DICOM series of the cases, for --dicom-seg.", ("--source",)),
            PathOption(
                "posteriors", "Write the posterior of each tissue as NIfTI too.", ("--posteriors",), switch=True
            ),
            _JSON,
        ),
        RefineConfig,
        ("lungseg refine cohort --export results", "lungseg refine cohort --fusion none --name diffseglung"),
        ("jobs", "shard", "overwrite", "dry_run", *_SAYING),
    ),
    Command(
        "evaluate",
        "lungseg.stages.evaluate:evaluate",
        "Score label maps of any tool against references: DSC, HD95 in mm, and what was missed. Label maps built in: "
        f"{', '.join(LABEL_CONVENTIONS)}.",
        (
            PathOption(
                "predictions",
                "Patch store, folders of label maps named like the references (one for each method), or a label map.",
                required=True,
                many=True,
            ),
            PathOption(
                "reference", "Reference label maps, a folder or a file; a store may hold its own.", ("--reference",)
            ),
            PathOption("id_map", "Id map of the store: references may be named like the sources.", ("--id-map",)),
            PathOption("patients", "CSV with columns case and patient, for folders.", ("--patients",)),
            PathOption("images", "Folder of CT scans named like the cases, for pictures.", ("--images",)),
            _output("Folder of the tables and pictures."),
            _JSON,
        ),
        EvaluateConfig,
        (
            "lungseg evaluate cohort --reference labels -o results --names diffseglung,density",
            "lungseg evaluate nnunet/ ours/ --reference labels -o results --label-map dataset.json --patients p.csv",
        ),
        ("jobs", "dry_run", *_SAYING),
    ),
    Command(
        "report",
        "lungseg.stages.report:report",
        "Pages to look at, which open from disk: the cohort with the worst scan first, a slice viewer for each scan.",
        (
            PathOption("results", "Patch store with label maps, or output folder of `lungseg run`.", required=True),
            _output("Folder of the pages."),
            _LOBES,
            PathOption("scores", "Output folder of `lungseg evaluate`: scores beside the numbers.", ("--scores",)),
            _PICTURES,
            _JSON,
        ),
        ReportConfig,
        ("lungseg report cohort -o report", "lungseg report cohort -o report --scores scores --pictures run"),
        ("jobs", "dry_run", *_SAYING),
    ),
    Command(
        "run",
        "lungseg.stages.run:run",
        "Everything for new scans: preprocess, cluster, refine, files, numbers and pictures.",
        (
            _SCANS,
            _output("Folder for the store, the maps and the numbers."),
            PathOption(
                "model",
                "Bundle, model.safetensors, training run, or `starter`: the shipped one; none: method rules.",
                ("--model",),
            ),
            PathOption("manifest", "CSV describing the cases, as for preprocess.", ("--manifest",)),
            PathOption("id_map", "CSV (mode 0600) linking case ids to sources.", ("--id-map",)),
            _SERIES,
            _LUNG_MASK,
            PathOption("train", "Train a model on these scans first.", ("--train",), switch=True),
            _PICTURES,
        ),
        RunConfig,
        (
            "lungseg run dicom/ -o out",
            "lungseg run dicom/ -o out --model bundle.safetensors",
        ),
        ("device", "jobs", "threads", "overwrite", "dry_run", *_SAYING),
        plan="lungseg.stages.run:plan_dict",
    ),
    Command(
        "demo",
        "lungseg.stages.demo:demo",
        "The whole pipeline on phantoms: trains on SAMPLES/train, scores on SAMPLES/test.",
        (
            PathOption("samples", "Folder with train/ and test/, as data_samples/.", required=True),
            _output("Folder for everything made."),
        ),
        None,
        ("lungseg demo data_samples -o demo-output", "lungseg demo data_samples -o demo-output --jobs 2"),
        ("device", "jobs", "threads", *_SAYING),
    ),
    Command(
        "phantom",
        "lungseg.stages.phantom:phantom",
        "Digital chest phantoms with known tissue: DICOM, NIfTI or a patch store, with reference label maps.",
        (_output("Folder to write."),),
        PhantomConfig,
        (
            "lungseg phantom -o phantoms -n 4",
            "lungseg phantom -o cohort -n 8 --format store --severity mixed --kernel sharp",
        ),
        ("jobs", "overwrite", "dry_run", *_SAYING),
    ),
    Command(
        "benchmark",
        "lungseg.stages.benchmark:benchmark",
        "The tables of the paper on digital phantoms: every method, and the cumulative ablation; WHAT is segmentation.",
        (
            PathOption("what", "Which benchmark: segmentation.", required=True),
            _output("Folder for phantoms, networks, maps and tables; the same command again goes on."),
        ),
        BenchmarkConfig,
        (
            "lungseg benchmark segmentation -o tables",
            "lungseg benchmark segmentation -o tables --rows rules,diffseglung --train 2 --test 2 --images 600",
        ),
        ("device", "jobs", "threads", "overwrite", "dry_run", *_SAYING),
        plan="lungseg.stages.benchmark:plan_dict",
    ),
    Command(
        "doctor",
        "lungseg.stages.doctor:doctor",
        "What this installation has and lacks; with STORE, whether every file of a store is sound.",
        (PathOption("store", "Patch store to verify."),),
        None,
        ("lungseg doctor", "lungseg doctor cohort"),
        _SAYING,
    ),
    Command(
        "info",
        "lungseg.stages.info:info",
        "Describe any artefact: a store, a file of it, a training run, a model, a scan.",
        (PathOption("artefact", "File or folder.", required=True),),
        None,
        ("lungseg info cohort", "lungseg info run/model.safetensors"),
        _SAYING,
    ),
)

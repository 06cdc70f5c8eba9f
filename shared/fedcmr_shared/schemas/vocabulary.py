"""The words of MMCMR-427K (arXiv 2512.21652) for acquisition metadata.

The lists are what the database and its file tree use. Disease codes whose expansion its
authors do not spell out are kept as codes.
"""

from typing import Final

MODALITIES: Final = (
    "cine",
    "T1 mapping",
    "T2 mapping",
    "T1rho mapping",
    "LGE",
    "perfusion",
    "tagging",
    "phase contrast",
    "black blood",
    "T1 weighted",
    "T2 weighted",
    "aorta",
)

VIEWS: Final = (
    "short-axis",
    "long-axis",
    "outflow tract",
    "sagittal aorta",
    "transversal aorta",
    "in-plane",
    "through-plane",
)

VENDORS: Final = ("Siemens", "UIH", "GE", "Philips")

SCANNERS: Final = {
    "Siemens": ("Avanto", "Aera", "Sola", "Prisma", "Vida", "Skyra", "Free.Max", "Cima.X"),
    "UIH": ("umr670", "umr780", "umr790", "umr880", "umr890", "Jupiter"),
    "GE": ("Voyager", "Signa HDx", "Signa Premier"),
    "Philips": ("Ingenia", "Achieva", "Ambition"),
}

FIELD_STRENGTHS_T: Final = (0.55, 1.5, 3.0, 5.0)

LIFE_SPANS: Final = ("fetal", "pediatric", "adult")

DISEASES: Final = {
    "NC": "normal control",
    "CAD": "coronary artery disease",
    "HCM": "hypertrophic cardiomyopathy",
    "DCM": "dilated cardiomyopathy",
    "RCM": None,
    "UCM": None,
    "MC": None,
    "MI": "myocardial infarction",
    "PC": None,
    "HHD": None,
    "PAH": None,
    "ARR": "arrhythmia",
    "HF": None,
    "HVD": None,
    "CHD": "congenital heart disease",
    "CBN": None,
    "CMN": None,
    "CAM": None,
}
"""17 disease codes and NC; ``None`` where the source does not spell the code out."""

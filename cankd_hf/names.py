"""Names that several rooms use: the project's address, files of a run, its arms, and teachers of torchvision.

`setup.py` reads this file too, so it imports nothing.
"""

ARM_FILE = "arm.json"  # a finished arm
AVERAGE_FILE = "ema.safetensors"  # what a training with `training.ema` resumes from
CARD_FILE = "README.md"
DETAILS_FILE = "details.json"  # scores of single images and what is confused with what
DATA_FILE = "data_files.json"  # files, sizes and class names of the data set of a run
DISTILLER_FILE = "distiller.safetensors"  # connectors and losses
FACTS_FILE = "distillation.json"  # what the trainer recorded about a student
LABEL_FILE = "label.json"  # how `cankd label` made a data set, and what it cost
LABEL_RECORDS = "label.jsonl"  # what it wrote of each image
MANIFEST_FILE = "teacher_manifest.json"
PICTURE_FILE = "predictions.png"
PICTURES_FOLDER = "predictions"  # those of earlier evaluations
RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "report.html"
RESULTS_FILE = "results.json"
THREADS_FILE = "threads.json"  # the number of CPU threads that a run began with
STATE_FILE = "trainer_state.json"  # written by transformers
RUN_FILES = {ARM_FILE, DATA_FILE, FACTS_FILE, RECIPE_FILE, THREADS_FILE}  # of which the folder of a run has one

TEACHER, STUDENT, ALONE, DISTILLED = "teacher", "student", "student alone", "student distilled"

EMA, RAW = "ema", "raw"  # the average of the weights and the last ones; subfolders of students that have them

TORCHVISION = "torchvision/"  # how teachers of torchvision begin
RANDOM_WEIGHTS = "random weights"  # name of a teacher without pretrained ones

# Where the project lives. The metadata of the package, cards, notebooks and pages name it; tests/test_release.py and
# .github/workflows keep them equal. Once the package is on the package index, `SOURCE` becomes "".
REPOSITORY = "https://github.com/cankd-hf/cankd-hf"
SOURCE = f" @ git+{REPOSITORY}"
INSTALL = f'pip install "cankd-hf{SOURCE}"'

from aopsam_lab.asf import AsfParams as AsfParams
from aopsam_lab.data import open_dataset as open_dataset
from aopsam_lab.detector import load_detector as load_detector
from aopsam_lab.pipeline.decode import encode as encode
from aopsam_lab.pipeline.methods import METHODS as METHODS
from aopsam_lab.pipeline.run import run_method as run_method
from aopsam_lab.pipeline.run import segment as segment
from aopsam_lab.pipeline.segmentation import Segmentation as Segmentation
from aopsam_lab.pipeline.show import plot as plot
from aopsam_lab.pipeline.show import save as save
from aopsam_lab.pipeline.types import MaskParams as MaskParams
from aopsam_lab.predictor import load_predictor as load_predictor
from aopsam_lab.sam.zoo import load_sam as load_sam
from aopsam_lab.study.runner import run_study as run_study
from aopsam_lab.widgets.explorer import explore as explore

__version__: str

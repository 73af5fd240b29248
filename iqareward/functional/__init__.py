from iqareward.functional.piqe import piqe as piqe

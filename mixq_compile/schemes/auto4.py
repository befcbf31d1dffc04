"""4 bit after calibration: weights by error feedback, for which the outlier columns kept make up too."""

from mixq_compile.formats import INT4, INT8
from mixq_compile.scheme import OutlierPolicy, QuantScheme

SCHEME = QuantScheme(
    name="auto4",
    summary="w4a8o16 with weights by error feedback, from calibration; down projections at 8 bit",
    weight=INT4,
    activation=INT8,
    outliers=OutlierPolicy(miss="static", choose="largest"),
    solver="clipped_feedback",
    instead=(("down", "auto8"),),
)

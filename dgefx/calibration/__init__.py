"""What a converted model learns from a handful of unlabelled images, without training.

Flow: `images` reads them, `importance` fits the routers' scores, `correction` the un-pooled
updates, `sensitivity` measures what every block loses at every budget, `calibrate` runs these in
turn and lets `dgefx.nn.budget` solve for the whole model.
"""

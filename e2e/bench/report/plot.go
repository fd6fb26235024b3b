package report

import (
	"fmt"
	"math"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
)

func (p Plot) write(file string) error {
	g := plot.New()
	g.Title.Text = p.Title
	g.Legend.Top, g.Legend.Left = true, true
	g.Add(plotter.NewGrid())
	p.X.apply(&g.X)
	p.Y.apply(&g.Y)
	for i, l := range p.Lines {
		points := make(plotter.XYs, len(l.Points))
		for j, at := range l.Points {
			points[j] = plotter.XY{X: p.X.place(at.X), Y: p.Y.place(at.Y)}
		}
		line, err := plotter.NewLine(points)
		if err != nil {
			return fmt.Errorf("line %s: %w", l.Name, err)
		}
		line.Color, line.Dashes, line.Width = plotutil.Color(i), plotutil.Dashes(i/len(plotutil.DefaultColors)), vg.Points(1.5)
		g.Add(line)
		g.Legend.Add(l.Name, line)
	}
	return g.Save(20*vg.Centimeter, 11*vg.Centimeter, file)
}

func (a Axis) apply(to *plot.Axis) {
	to.Label.Text = a.Label
	switch {
	case a.Percentiles:
		var ticks plot.ConstantTicks
		for _, p := range []float64{0, 50, 75, 90, 95, 99, 99.5, 99.9, 99.95, 99.99, 99.999} {
			ticks = append(ticks, plot.Tick{Value: a.place(p), Label: strconv.FormatFloat(p, 'f', -1, 64)})
		}
		to.Tick.Marker = ticks
	case a.Log:
		to.Scale = plot.LogScale{}
		to.Tick.Marker = plot.LogTicks{Prec: -1}
	default:
		to.Min = 0
	}
}

// place is where a value stands on the axis: each further nine of a percentile takes as much room as the one before.
func (a Axis) place(v float64) float64 {
	if !a.Percentiles {
		return v
	}
	return -math.Log10(1 - min(v, 99.9999)/100)
}

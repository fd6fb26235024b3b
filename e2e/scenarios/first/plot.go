package first

import (
	"bytes"
	"fmt"
	"image/color"
	"math"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// Ends of the time axis: 0.5 ms and 3 s. It is linear in the logarithm: plot's own logarithmic scale leaves a third of it empty.
var begin, end = decade(0.5), decade(3000)

// decade is where a time in milliseconds stands.
func decade(ms float64) float64 { return math.Log10(ms) }

// svg shows, for each size of burst, which part of the pods was served within which time. A curve ends at the served part.
func (r *Report) svg() ([]byte, error) {
	canvas := vgsvg.New(26*vg.Centimeter, 10*vg.Centimeter)
	all := draw.New(canvas)
	all.SetColor(color.White)
	all.Fill(all.Rectangle.Path())
	legend(draw.Crop(all, vg.Centimeter, 0, 9.2*vg.Centimeter, 0))
	panels := draw.Crop(all, 0, 0, 0, -vg.Centimeter)
	tiles := draw.Tiles{Rows: 1, Cols: len(Sizes), PadX: 8 * vg.Millimeter, PadBottom: 3 * vg.Millimeter, PadLeft: 3 * vg.Millimeter, PadRight: 6 * vg.Millimeter}
	for i, size := range Sizes {
		r.panel(size).Draw(tiles.At(panels, i, 0))
	}
	var b bytes.Buffer
	_, err := canvas.WriteTo(&b)
	return b.Bytes(), err
}

// curves are drawn in this order, the most important last.
var curves = []struct {
	source, label string
	style         draw.LineStyle
}{
	{Informer, "imdsgate, API server alone", draw.LineStyle{Color: color.NRGBA{0xd9, 0x6c, 0x0c, 0xff}, Width: vg.Points(1.8)}},
	{CNI, "imdsgate", draw.LineStyle{Color: color.NRGBA{0x1f, 0x5f, 0xbf, 0xff}, Width: vg.Points(1.8)}},
}

// level is the line of a peer: only its served part is known.
func level(peer int) draw.LineStyle {
	return draw.LineStyle{Color: color.NRGBA{0x70, 0x70, 0x70, 0xff}, Width: vg.Points(1), Dashes: []vg.Length{vg.Points(float64(6 - 4*peer)), vg.Points(2)}}
}

// legend is a line of its own: what a viewer's fonts make of the texts must not run into the curves.
func legend(c draw.Canvas) {
	at, middle := c.Min.X, c.Center().Y
	add := func(label string, style draw.LineStyle, width vg.Length) {
		c.StrokeLine2(style, at, middle, at+vg.Centimeter, middle)
		c.FillText(text(12, draw.YCenter), vg.Point{X: at + 1.2*vg.Centimeter, Y: middle}, label)
		at += width
	}
	for i := range curves {
		of := curves[len(curves)-1-i]
		add(of.label, of.style, vg.Length(4+5*i)*vg.Centimeter)
	}
	for i, p := range peers {
		add(p.name+", in all", level(i), 5*vg.Centimeter)
	}
}

func text(size vg.Length, y draw.YAlignment) draw.TextStyle {
	return draw.TextStyle{Color: color.Black, Font: font.From(font.Font{Typeface: "Liberation", Variant: "Sans"}, size), Handler: plot.DefaultTextHandler, YAlign: y}
}

func (r *Report) panel(size int) *plot.Plot {
	var xs, ys plot.ConstantTicks
	p := plot.New()
	p.Title.Text = "one pod at a time"
	if size > 1 {
		p.Title.Text = fmt.Sprint(size, " pods at once")
	}
	p.X.Label.Text, p.Y.Label.Text = "ms for token, list and document", "pods served, %"
	for _, t := range []*font.Font{&p.Title.TextStyle.Font, &p.X.Label.TextStyle.Font, &p.Y.Label.TextStyle.Font, &p.X.Tick.Label.Font, &p.Y.Tick.Label.Font} {
		*t = text(11, 0).Font
	}
	p.X.Min, p.X.Max, p.Y.Min, p.Y.Max = begin, end, 0, 105
	for _, ms := range []float64{1, 10, 100, 1000} {
		xs = append(xs, plot.Tick{Value: decade(ms), Label: fmt.Sprint(ms)})
	}
	for _, share := range []float64{0, 25, 50, 75, 100} {
		ys = append(ys, plot.Tick{Value: share, Label: fmt.Sprint(share)})
	}
	p.X.Tick.Marker, p.Y.Tick.Marker = xs, ys
	p.Add(plotter.NewGrid())
	for i, of := range peers {
		share := of.share[size]
		p.Add(&plotter.Line{XYs: plotter.XYs{{X: begin, Y: share}, {X: end, Y: share}}, LineStyle: level(i)})
	}
	for _, of := range curves {
		if burst := r.Burst(of.source, size); burst != nil {
			p.Add(&plotter.Line{XYs: burst.curve(), StepStyle: plotter.PostStep, LineStyle: of.style})
		}
	}
	return p
}

// curve is the served part by time.
func (b Burst) curve() plotter.XYs {
	at := plotter.XYs{{X: begin, Y: 0}}
	for i, t := range b.Milliseconds {
		at = append(at, plotter.XY{X: min(max(decade(t), begin), end), Y: 100 * float64(i+1) / float64(max(b.Pods, 1))})
	}
	return append(at, plotter.XY{X: end, Y: b.Share()})
}

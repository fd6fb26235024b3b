package monitoring

import (
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

var update = flag.Bool("update", false, "write docs/dashboard.svg")

// series is one line of a panel: what Prometheus answers to a range query.
type series struct {
	Metric map[string]string
	Values [][2]any
}

func (s *scraped) queryRange(t *testing.T, expr string, from, to time.Time) []series {
	t.Helper()
	seconds := func(at time.Time) string { return strconv.FormatFloat(float64(at.UnixMilli())/1000, 'f', 3, 64) }
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.url+"/api/v1/query_range?"+url.Values{
		"query": {expr}, "start": {seconds(from)}, "end": {seconds(to)}, "step": {"0.5"},
	}.Encode(), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var answer struct {
		Status, Error string
		Data          struct{ Result []series }
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Status != "success" {
		t.Fatalf("%s: %v %s", expr, err, answer.Error)
	}
	return answer.Data.Result
}

// picture draws the dashboard's panels as Grafana would place them, over the time since from.
func (s *scraped) picture(t *testing.T, d dashboard, from time.Time, file string) {
	t.Helper()
	to := time.Now()
	const unit = vg.Length(1.6) * vg.Centimeter // of Grafana's grid, 24 to a row
	rows := 0
	for _, p := range d.Panels {
		rows = max(rows, p.GridPos.Y+p.GridPos.H)
	}
	c := vgsvg.New(24*unit, vg.Length(rows)*unit*0.6)
	page := draw.New(c)
	for _, panel := range d.Panels {
		g := panel.GridPos
		area := draw.Canvas{Canvas: page.Canvas}
		area.Min = vg.Point{X: vg.Length(g.X) * unit, Y: page.Max.Y - vg.Length(g.Y+g.H)*unit*0.6}
		area.Max = vg.Point{X: vg.Length(g.X+g.W) * unit, Y: page.Max.Y - vg.Length(g.Y)*unit*0.6}
		area = draw.Crop(area, 6, -6, 6, -6)
		p := plot.New()
		p.Title.Text = panel.Title
		p.Legend.Top, p.Legend.Left = true, true
		lines := 0
		for _, target := range panel.Targets {
			for _, found := range s.queryRange(t, fill(target.Expr), from, to) {
				var points plotter.XYs
				var highest float64
				for _, v := range found.Values {
					y, err := strconv.ParseFloat(fmt.Sprint(v[1]), 64)
					if x, ok := v[0].(float64); ok && err == nil && !math.IsNaN(y) && !math.IsInf(y, 0) {
						highest = max(highest, y)
						points = append(points, plotter.XY{X: x - float64(from.Unix()), Y: y})
					}
				}
				if len(points) == 0 {
					continue
				}
				if panel.Type == "stat" {
					p.Title.Text = fmt.Sprintf("%s: %.4g", panel.Title, points[len(points)-1].Y)
					continue
				}
				line, err := plotter.NewLine(points)
				if err != nil {
					t.Fatal(err)
				}
				line.Color = plotutil.Color(lines)
				p.Add(line)
				legend := target.LegendFormat
				for label, value := range found.Metric {
					legend = strings.ReplaceAll(legend, "{{"+label+"}}", value)
				}
				if legend != "" && highest > 0 {
					p.Legend.Add(legend, line)
				}
				lines++
			}
		}
		if panel.Type == "stat" {
			p.HideAxes()
		} else {
			p.X.Label.Text, p.Y.Label.Text, p.Y.Min = "s", panel.FieldConfig.Defaults.Unit, 0
		}
		p.Draw(area)
	}
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := c.WriteTo(out); err != nil {
		t.Fatal(err)
	}
}

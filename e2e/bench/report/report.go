// Package report gathers what was measured into one report: bench.json for programs, bench.md for people, and an SVG for each
// plot. Each measurement is a Section; Add puts it among those that are there, so that measurements can be made by different
// processes, one after the other, and again one at a time.
package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Section is one measurement.
type Section struct {
	ID     string    `json:"id"` // of lower-case letters, digits and hyphens; a Section replaces the one with the same ID
	Title  string    `json:"title"`
	Text   string    `json:"text"` // what was measured and how, in Markdown: a reader must be able to judge and repeat it
	Bars   []Bar     `json:"bars,omitempty"`
	Tables []Table   `json:"tables,omitempty"`
	Plots  []Plot    `json:"plots,omitempty"`
	Taken  time.Time `json:"taken"` // Add fills it in when it is zero
	On     Machine   `json:"on"`    // Add fills it in when it is zero
}

// Bar is a figure that must not be exceeded.
type Bar struct {
	What  string  `json:"what"`
	Value float64 `json:"value"`
	Max   float64 `json:"max"`
	Unit  string  `json:"unit"` // "×" for ratios; empty for counts
	// Noise is how far the reference was from itself in the same run, in the same unit: the error bar. Nil: none was taken,
	// because the figure is a count or a size.
	Noise *Range `json:"noise,omitempty"`
	// Note says what a reader must know of the figure, in a few words.
	Note string `json:"note,omitempty"`
}

// Range is where figures were found.
type Range struct {
	Min float64 `json:"min"`
	Max float64 `json:"max"`
}

// Verdict is what a Bar's figure says.
type Verdict string

// The verdicts.
const (
	Met    Verdict = "met"
	NotMet Verdict = "not met"
	Noise  Verdict = "in the noise" // above the bar, but the reference came as far from itself
)

// Verdict compares the figure with the bar.
func (b Bar) Verdict() Verdict {
	switch {
	case b.Value <= b.Max:
		return Met
	case b.Noise != nil && b.Noise.Max >= b.Value:
		return Noise
	}
	return NotMet
}

// Table is printed as it is. Every row has as many cells as Head.
type Table struct {
	Title string     `json:"title"`
	Head  []string   `json:"head"`
	Rows  [][]string `json:"rows"`
}

// Plot becomes the picture NAME.svg.
type Plot struct {
	Name  string `json:"name"` // of lower-case letters, digits and hyphens; unique in the report
	Title string `json:"title"`
	X     Axis   `json:"x"`
	Y     Axis   `json:"y"`
	Lines []Line `json:"lines"`
}

// Axis is one axis of a Plot.
type Axis struct {
	Label string `json:"label"`
	Log   bool   `json:"log,omitempty"` // all values must be positive
	// Percentiles is for curves of latencies: the values are percentiles from 0 to below 100, the axis stretches the last ones.
	Percentiles bool `json:"percentiles,omitempty"`
}

// Line is one curve.
type Line struct {
	Name   string  `json:"name"`
	Points []Point `json:"points"`
}

// Point is a point of a curve.
type Point struct {
	X float64 `json:"x"`
	Y float64 `json:"y"`
}

const (
	jsonFile     = "bench.json"
	markdownFile = "bench.md"
)

// Report is the content of bench.json.
type Report struct {
	Sections []Section `json:"sections"` // in the order in which they first came
}

// Read reads the report in dir; one that is not there is empty.
func Read(dir string) (Report, error) {
	var r Report
	text, err := os.ReadFile(filepath.Join(dir, jsonFile))
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil {
		return Report{}, fmt.Errorf("read the report: %w", err)
	}
	return r, nil
}

// Add puts s into the report in dir, which it makes when it is missing, and writes its files anew. Only one process at a time
// may do so.
func Add(dir string, s Section) error {
	if s.Taken.IsZero() {
		s.Taken = time.Now().UTC().Truncate(time.Second)
	}
	if s.On == (Machine{}) {
		var err error
		if s.On, err = thisMachine(); err != nil {
			return err
		}
	}
	r, err := Read(dir)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(r.Sections, func(old Section) bool { return old.ID == s.ID })
	if i < 0 {
		r.Sections = append(r.Sections, s)
	} else {
		r.Sections[i] = s
	}
	if err := r.write(dir); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}

func (r Report) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, s := range r.Sections {
		for _, p := range s.Plots {
			if err := p.write(filepath.Join(dir, p.Name+".svg")); err != nil {
				return fmt.Errorf("plot %s: %w", p.Name, err)
			}
		}
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, jsonFile), append(text, '\n'), 0o644),
		os.WriteFile(filepath.Join(dir, markdownFile), r.markdown(), 0o644),
	)
}

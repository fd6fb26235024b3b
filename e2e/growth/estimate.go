package growth

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// estimate is a figure above what the API server does for nobody, and how far that is from itself.
type estimate struct{ value, noise float64 }

// above compares what was measured with the same in some idle minutes, the share of which is in it.
func above(measured float64, idle []float64, share float64) estimate {
	var sum float64
	for _, x := range idle {
		sum += x
	}
	return estimate{measured - share*sum/float64(len(idle)), slices.Max(idle) - slices.Min(idle)}
}

func (e estimate) times(n float64) estimate { return estimate{e.value * n, e.noise * n} }

// text says nothing of a value that the noise alone may have made; one below zero is noise as well.
func (e estimate) text(digits int) string {
	noise := fmt.Sprintf("%.*f", digits, max(e.noise, -e.value))
	switch zero := fmt.Sprintf("%.*f", digits, 0.); {
	case e.value <= e.noise && noise != zero:
		return "below the noise (± " + noise + ")"
	case noise != zero:
		return fmt.Sprintf("%.*f ± %s", digits, e.value, noise)
	}
	return fmt.Sprintf("%.*f", digits, max(0, e.value))
}

// kinds says what each of some clients asked for, most first, but for what is less than a tenth of a request.
func kinds(did apiServer, clients int, idle []apiServer, share float64) string {
	type asked struct {
		kind string
		n    float64
	}
	var all []asked
	for kind := range did.Requests {
		e := above(did.Requests[kind], each(idle, func(a apiServer) float64 { return a.Requests[kind] }), share).times(1 / float64(clients))
		if e.value >= 0.1 && e.value > e.noise {
			all = append(all, asked{kind, e.value})
		}
	}
	slices.SortFunc(all, func(a, b asked) int { return cmp.Or(cmp.Compare(b.n, a.n), cmp.Compare(a.kind, b.kind)) })
	if len(all) == 0 {
		return "nothing"
	}
	texts := make([]string, len(all))
	for i, a := range all {
		texts[i] = fmt.Sprintf("%s %.1f", a.kind, a.n)
	}
	return strings.Join(texts, ", ")
}

func each(idle []apiServer, of func(apiServer) float64) []float64 {
	figures := make([]float64, len(idle))
	for i, a := range idle {
		figures[i] = of(a)
	}
	return figures
}

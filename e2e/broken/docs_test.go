package broken_test

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the table into docs/diagnosis.md")

// TestDocs: docs/diagnosis.md has the table that the tests above hold imdsgate to.
func TestDocs(t *testing.T) {
	const begin, end = "<!-- broken -->\n", "<!-- /broken -->"
	path := filepath.Join("..", "..", "docs", "diagnosis.md")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, found := strings.Cut(string(text), begin)
	_, tail, ended := strings.Cut(rest, end)
	if !found || !ended {
		t.Fatalf("%s has no table between %q and %q", path, begin, end)
	}
	var b strings.Builder
	b.WriteString("| what is wrong | what it says | fix | where |\n|---|---|---|---|\n")
	cell := func(s string) string {
		if s == "" {
			return ""
		}
		return "`" + strings.ReplaceAll(s, "|", `\|`) + "`"
	}
	for _, c := range table {
		fmt.Fprintf(&b, "| %s | %s | %s | answer %d, Event %s |\n", c.symptom, cell(c.says), cell(c.fix), c.status, c.event)
	}
	for _, name := range slices.Sorted(maps.Keys(others)) {
		o := others[name]
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", o.symptom, cell(o.says), cell(o.fix), o.where)
	}
	want := head + begin + b.String() + end + tail
	if want == string(text) {
		return
	}
	if !*update {
		t.Fatalf("%s is not what the tests say: go test ./broken -run TestDocs -update", path)
	}
	if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
}

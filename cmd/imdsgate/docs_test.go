package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// repository is the root of the checkout.
const repository = "../.."

// The names that the documents use are those of the source. A security page whose tests were renamed proves nothing; CHANGELOG.md
// alone may speak of what is no more.

// TestDocsNameTests: every test that a document or a package comment names as its proof is there, in either module.
func TestDocsNameTests(t *testing.T) {
	name := regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z][A-Za-z0-9_]*…?`)
	tests := map[string]bool{}
	texts := documents(t)
	source(t, parser.ParseComments|parser.SkipObjectResolution, func(path string, f *ast.File) {
		if !strings.HasSuffix(path, "_test.go") {
			if f.Doc != nil {
				texts[path] = f.Doc.Text()
			}
			return
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && name.MatchString(fn.Name.Name) {
				tests[fn.Name.Name] = true
			}
		}
	})
	for path, text := range texts {
		for _, n := range name.FindAllString(text, -1) {
			prefix, all := strings.CutSuffix(n, "…")
			begins := func(test string) bool { return strings.HasPrefix(test, prefix) }
			if !tests[n] && !(all && slices.ContainsFunc(slices.Collect(maps.Keys(tests)), begins)) {
				t.Errorf("%s names %s, which is no test", path, n)
			}
		}
	}
	// Without these the page would be no threat model, and the test would pass on an empty tree.
	if n := len(slices.Compact(slices.Sorted(slices.Values(name.FindAllString(texts["SECURITY.md"], -1))))); n < 40 {
		t.Errorf("SECURITY.md names %d tests", n)
	}
}

// TestDocsLinks: relative links, their anchors and the paths in code spans lead to something.
func TestDocsLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	path := regexp.MustCompile("`((?:\\.github|\\.ci|cache|cmd|deploy|docs|e2e|iptables|proxy)/[A-Za-z0-9_./-]*)`")
	for doc, text := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
				continue
			}
			file, anchor, _ := strings.Cut(m[1], "#")
			target := filepath.Join(repository, filepath.Dir(doc), file)
			if file == "" {
				target = filepath.Join(repository, doc)
			}
			b, err := os.ReadFile(target)
			if err != nil && !isDir(target) {
				t.Errorf("%s links to %s, which is not there", doc, m[1])
			}
			if anchor != "" && !slices.Contains(anchors(string(b)), anchor) {
				t.Errorf("%s links to %s, which has no such heading", doc, m[1])
			}
		}
		for _, m := range path.FindAllStringSubmatch(text, -1) {
			_, fromRoot := os.Stat(filepath.Join(repository, m[1]))
			_, fromDoc := os.Stat(filepath.Join(repository, filepath.Dir(doc), m[1]))
			if fromRoot != nil && fromDoc != nil {
				t.Errorf("%s names the path %s, which is not there", doc, m[1])
			}
		}
	}
}

// TestDocsNames: make targets, flags of every program here, flags in the chart's values, and metrics.
func TestDocsNames(t *testing.T) {
	makefile, err := os.ReadFile(filepath.Join(repository, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	targets := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^([a-z][a-z-]*):`).FindAllStringSubmatch(string(makefile), -1) {
		targets[m[1]] = true
	}
	metrics := map[string]bool{}
	literal := regexp.MustCompile(`^"(imdsgate_[a-z0-9_]+)"$`)
	source(t, parser.SkipObjectResolution, func(path string, f *ast.File) {
		if strings.HasSuffix(path, "_test.go") || strings.HasPrefix(path, "e2e/") {
			return
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if l, ok := n.(*ast.BasicLit); ok {
				if m := literal.FindStringSubmatch(l.Value); m != nil {
					metrics[m[1]] = true
				}
			}
			return true
		})
	})
	var c Config
	var ips []string
	own := c.flags(&ips)
	others := flagsOfPrograms(t)

	target := regexp.MustCompile(`(?:^|[;&|] ?)make((?: [a-z][a-z-]*)+)`)
	option := regexp.MustCompile(`^(?:.*\bimdsgate )?-([a-z][a-z0-9-]+)`)
	value := regexp.MustCompile(`\bflags\.([a-z][a-z0-9-]+)`)
	metric := regexp.MustCompile(`\bimdsgate_[a-z0-9_]+`)
	for doc, text := range documents(t) {
		known := func(kind, name string, ok bool) {
			if !ok {
				t.Errorf("%s names the %s %s, which there is not", doc, kind, name)
			}
		}
		for _, code := range codeOf(text) {
			for _, m := range target.FindAllStringSubmatch(code, -1) {
				for name := range strings.FieldsSeq(m[1]) {
					known("make target", name, targets[name])
				}
			}
			if m := option.FindStringSubmatch(code); m != nil {
				known("flag", m[1], own.Lookup(m[1]) != nil || others[m[1]])
			}
			for _, m := range value.FindAllStringSubmatch(code, -1) {
				known("flag", m[1], own.Lookup(m[1]) != nil)
			}
		}
		for _, name := range metric.FindAllString(text, -1) {
			family := name
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				family = strings.TrimSuffix(family, suffix)
			}
			known("metric", name, metrics[name] || metrics[family])
		}
	}
	if len(targets) < 10 || len(metrics) < 10 || own.Lookup("node") == nil {
		t.Fatalf("%d targets, %d metrics: the source was not read", len(targets), len(metrics))
	}
}

// flagsOfPrograms are those that the other programs of both modules define.
func flagsOfPrograms(t *testing.T) map[string]bool {
	t.Helper()
	define := regexp.MustCompile(`^(Bool|Duration|Float64|Func|Int|String|Uint)$|^(Bool|Duration|Float64|Int|String|Text|Uint)?Var$`)
	names := map[string]bool{}
	source(t, parser.SkipObjectResolution, func(_ string, f *ast.File) {
		if f.Name.Name != "main" {
			return
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if sel, ok := call.Fun.(*ast.SelectorExpr); ok && define.MatchString(sel.Sel.Name) {
				for _, arg := range call.Args[:min(2, len(call.Args))] { // the name, behind the variable if there is one
					if l, ok := arg.(*ast.BasicLit); ok && l.Kind == token.STRING {
						names[strings.Trim(l.Value, `"`)] = true
						break
					}
				}
			}
			return true
		})
	})
	return names
}

// documents are the Markdown files by their path from the root.
func documents(t *testing.T) map[string]string {
	t.Helper()
	docs := map[string]string{}
	walk(t, ".md", func(path string) {
		b, err := os.ReadFile(filepath.Join(repository, path))
		if err != nil {
			t.Fatal(err)
		}
		if path != "CHANGELOG.md" {
			docs[path] = string(b)
		}
	})
	return docs
}

// source calls visit for every Go file of both modules.
func source(t *testing.T, mode parser.Mode, visit func(path string, f *ast.File)) {
	t.Helper()
	walk(t, ".go", func(path string) {
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(repository, path), nil, mode)
		if err != nil {
			t.Fatal(err)
		}
		visit(path, f)
	})
}

func walk(t *testing.T, ext string, visit func(path string)) {
	t.Helper()
	err := filepath.WalkDir(repository, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			switch name := d.Name(); {
			case name == "testdata", name == "node_modules", name == "out", name == "bin", strings.HasPrefix(name, ".") && name != ".github" && path != repository:
				return filepath.SkipDir
			}
			return nil
		}
		if filepath.Ext(path) == ext {
			rel, err := filepath.Rel(repository, path)
			if err != nil {
				return err
			}
			visit(rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// codeOf are the code spans of a text, and the lines of its code blocks.
func codeOf(text string) []string {
	span := regexp.MustCompile("`([^`]+)`")
	var code []string
	fenced := false
	for line := range strings.Lines(text) {
		trimmed := strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(trimmed, "```"):
			fenced = !fenced
		case fenced || strings.HasPrefix(line, "    "):
			code = append(code, trimmed)
		default:
			for _, m := range span.FindAllStringSubmatch(line, -1) {
				code = append(code, m[1])
			}
		}
	}
	return code
}

// anchors of a text's headings.
func anchors(text string) []string {
	drop := regexp.MustCompile(`[^a-z0-9 _-]`)
	var all []string
	for line := range strings.Lines(text) {
		if heading := strings.TrimLeft(line, "#"); heading != line {
			a := drop.ReplaceAllString(strings.ToLower(strings.TrimSpace(heading)), "")
			all = append(all, strings.ReplaceAll(a, " ", "-"))
		}
	}
	return all
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

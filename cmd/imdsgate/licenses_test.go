package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// license tells the licences that a text holds, by SPDX identifier. An unknown text has none.
func license(text string) (ids []string) {
	text = strings.Join(strings.Fields(text), " ")
	has := func(phrases ...string) bool {
		return !slices.ContainsFunc(phrases, func(p string) bool { return !strings.Contains(text, p) })
	}
	if has("Apache License", "Version 2.0, January 2004", "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION") ||
		has("Licensed under the Apache License, Version 2.0") {
		ids = append(ids, "Apache-2.0")
	}
	if has("Permission is hereby granted, free of charge, to any person obtaining a copy", "THE SOFTWARE IS PROVIDED") {
		ids = append(ids, "MIT")
	}
	if has("Redistribution and use in source and binary forms", "THIS SOFTWARE IS PROVIDED BY THE") {
		if has("endorse or promote") {
			ids = append(ids, "BSD-3-Clause")
		} else {
			ids = append(ids, "BSD-2-Clause")
		}
	}
	if regexp.MustCompile(`Permission to use, copy, modify, and(/or)? distribute this software for any purpose`).MatchString(text) {
		ids = append(ids, "ISC")
	}
	for phrase, id := range map[string]string{
		"GNU GENERAL PUBLIC LICENSE": "GPL", "GNU LESSER GENERAL PUBLIC LICENSE": "LGPL", "GNU AFFERO GENERAL PUBLIC LICENSE": "AGPL",
		"Mozilla Public License": "MPL", "Business Source License": "BUSL", "Server Side Public License": "SSPL",
	} {
		if has(phrase) {
			ids = append(ids, id)
		}
	}
	return ids
}

// TestLicenses: whatever is linked into the binary is under a licence that asks for no more than its text, and
// THIRD_PARTY_LICENSES, which goes with the binary, holds these texts. -update writes it.
func TestLicenses(t *testing.T) {
	permitted := []string{"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT"}
	named := regexp.MustCompile(`(?i)^(license|licence|unlicense|copying|notice)`)
	type text struct {
		notice bool // which a licence wants to be kept beside it
		body   string
	}
	texts := map[text][]string{} // whose
	licensed := map[string]bool{}
	add := func(owner, path string) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		notice := strings.HasPrefix(strings.ToLower(filepath.Base(path)), "notice")
		licensed[owner] = licensed[owner] || !notice
		k := text{notice, strings.TrimSpace(strings.ReplaceAll(string(b), "\r\n", "\n"))}
		if !slices.Contains(texts[k], owner) {
			texts[k] = append(texts[k], owner)
		}
	}
	goroot, err := exec.CommandContext(t.Context(), "go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	add("the Go standard library", filepath.Join(strings.TrimSpace(string(goroot)), "LICENSE"))
	for _, p := range linked(t) {
		if p.Module == nil || p.Module.Main {
			continue
		}
		if !licensed[p.Module.Path] {
			licensed[p.Module.Path] = false // until there is one
		}
		for dir := p.Dir; ; dir = filepath.Dir(dir) {
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				if e.Type().IsRegular() && named.MatchString(e.Name()) && filepath.Ext(e.Name()) != ".go" {
					add(p.Module.Path, filepath.Join(dir, e.Name()))
				}
			}
			if dir == p.Module.Dir {
				break
			}
		}
	}
	for module, ok := range licensed {
		if !ok {
			t.Errorf("%s has no licence", module)
		}
	}
	if len(licensed) < 20 {
		t.Fatalf("%d modules: go list was not understood", len(licensed))
	}

	var sections []string
	for k, owners := range texts {
		slices.Sort(owners)
		kind := "Notice"
		if !k.notice {
			ids := license(k.body)
			if len(ids) == 0 {
				t.Errorf("%v: a licence that is not known:\n%.300s", owners, k.body)
			}
			for _, id := range ids {
				if !slices.Contains(permitted, id) {
					t.Errorf("%v: %s is not permitted", owners, id)
				}
			}
			kind = strings.Join(ids, ", ")
		}
		sections = append(sections, fmt.Sprintf("\n%s\n%s\n%s\n\n%s\n", strings.Repeat("=", 80), strings.Join(owners, "\n"), kind, k.body))
	}
	slices.Sort(sections)
	golden(t, filepath.Join(repository, "THIRD_PARTY_LICENSES"),
		[]byte("The programs imdsgate and imdsgate-load are linked with these works of others. Written by: make docs\n"+strings.Join(sections, "")))
}

type goPackage struct {
	Dir    string
	Module *struct {
		Path, Dir string
		Main      bool
	}
}

// linked are the packages of the binary, for both architectures.
func linked(t *testing.T) (all []goPackage) {
	t.Helper()
	for _, arch := range []string{"amd64", "arm64"} {
		cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-json=Dir,Module", "./cmd/...")
		cmd.Dir = repository
		cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+arch, "CGO_ENABLED=0")
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("go list: %v", err)
		}
		for d := json.NewDecoder(bytes.NewReader(out)); ; {
			var p goPackage
			err := d.Decode(&p)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, p)
		}
	}
	return all
}

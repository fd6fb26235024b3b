// Package deploy_test proves what a user installs: the chart, the manifest made of it, the files for a node's boot.
package deploy_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

var update = flag.Bool("update", false, "write deploy/imdsgate.yaml")

// shared is the lab whose real API server judges the chart's objects.
var shared *lab.Lab

func TestMain(m *testing.M) { os.Exit(labtest.Main(m, func(l *lab.Lab) { shared = l })) }

const (
	deployDir = "../../deploy"
	chartDir  = deployDir + "/chart"
)

// required satisfies what the chart requires.
var required = []string{"--set", "image.repository=imdsgate"}

func helmPath(t testing.TB) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(cache, "imdsgate-e2e", "bin", "helm")
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: build it once with `make cluster-bins`", err)
	}
	return path
}

func helm(t testing.TB, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, helmPath(t), args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+t.TempDir(), "HELM_CONFIG_HOME="+t.TempDir(), "HELM_DATA_HOME="+t.TempDir())
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// objects are what a rendering creates.
type objects []*unstructured.Unstructured

func template(t testing.TB, namespace string, args ...string) (string, objects) {
	t.Helper()
	out, stderr, err := helm(t, append(append([]string{"template", "imdsgate", chartDir, "-n", namespace}, required...), args...)...)
	if err != nil {
		t.Fatalf("helm template %v: %v\n%s", args, err, stderr)
	}
	return out, decode(t, out)
}

func decode(t testing.TB, text string) objects {
	t.Helper()
	var all objects
	d := yaml.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096)
	for {
		o := &unstructured.Unstructured{}
		switch err := d.Decode(o); {
		case errors.Is(err, io.EOF):
			return all
		case err != nil:
			t.Fatal(err)
		case len(o.Object) > 0:
			all = append(all, o)
		}
	}
}

// names are "Kind name", in order.
func (all objects) names() []string {
	var names []string
	for _, o := range all {
		names = append(names, o.GetKind()+" "+o.GetName())
	}
	return names
}

// get decodes the one object of a kind into a typed one, and fails on fields that the type does not have.
func get[T any](t testing.TB, all objects, kind string) *T {
	t.Helper()
	for _, o := range all {
		if o.GetKind() != kind {
			continue
		}
		b, err := o.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		d := json.NewDecoder(bytes.NewReader(b))
		d.DisallowUnknownFields()
		v := new(T)
		if err := d.Decode(v); err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		return v
	}
	t.Fatalf("no %s in %v", kind, all.names())
	return nil
}

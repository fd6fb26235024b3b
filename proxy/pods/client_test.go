package pods

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The startup taint goes, the others stay.
func TestRemoveTaint(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	h := newHarness(t, a, testPolicy())
	keep := corev1.Taint{Key: "keep", Value: "x", Effect: corev1.TaintEffectNoExecute}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName}}
	node.Spec.Taints = []corev1.Taint{
		{Key: "imdsgate.dev/starting", Effect: corev1.TaintEffectNoSchedule}, keep, {Key: "imdsgate.dev/starting", Effect: corev1.TaintEffectNoExecute},
	}
	if err := h.RemoveTaint(t.Context(), "imdsgate.dev/starting"); err == nil {
		t.Error("removed from a node that does not exist")
	}
	a.put(node)
	for range 2 {
		if err := h.RemoveTaint(t.Context(), "imdsgate.dev/starting"); err != nil {
			t.Error(err)
		}
		if d := cmp.Diff([]corev1.Taint{keep}, a.objects["nodes"]["/"+nodeName].(*corev1.Node).Spec.Taints); d != "" {
			t.Errorf("taints (-want +got):\n%s", d)
		}
	}
	a.put(node)
	a.set(func() { a.forbidden["patch nodes"] = true })
	if err := h.RemoveTaint(t.Context(), "imdsgate.dev/starting"); err == nil || !strings.Contains(err.Error(), "the permission to patch nodes is missing") {
		t.Errorf("RemoveTaint = %v", err)
	}
}

func TestLoadConfig(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := LoadConfig(""); err == nil || !strings.Contains(err.Error(), "-kubeconfig") {
		t.Errorf("outside a cluster: %v", err)
	}
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if _, err := LoadConfig(file); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("no such file: %v", err)
	}
	const kubeconfig = `{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"k"}}],` +
		`"clusters":[{"name":"k","cluster":{"server":"https://127.0.0.1:6443"}}]}`
	if err := os.WriteFile(file, []byte(kubeconfig), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := LoadConfig(file); err != nil || c.Host != "https://127.0.0.1:6443" {
		t.Errorf("LoadConfig = %v, %v", c, err)
	}
}

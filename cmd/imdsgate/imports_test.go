package main

import (
	"os/exec"
	"strings"
	"testing"
)

// TestImportDirection is the architecture as a failing test: cmd → {proxy/pods, cache/sts, iptables} → proxy → cache.
// Adapters know the core, never the reverse and never each other.
func TestImportDirection(t *testing.T) {
	const module = "github.com/imdsgate/imdsgate/"
	for _, tt := range []struct {
		pkg    string
		banned map[string]string // import path prefix → why
	}{
		{"cache", map[string]string{
			module + "proxy": "the cache knows no wire format", module + "iptables": "nor netfilter",
			"k8s.io": "nor Kubernetes", "github.com/aws": "nor AWS", "github.com/vishvananda": "nor netlink",
		}},
		{"proxy", map[string]string{
			module + "iptables": "the endpoint knows no netfilter", module + "proxy/pods": "the core knows no adapter",
			module + "cache/sts": "the core knows no adapter", "k8s.io": "nor Kubernetes", "github.com/aws": "nor AWS",
			"github.com/vishvananda": "nor netlink", "github.com/coreos": "nor iptables",
		}},
		{"proxy/pods", map[string]string{
			module + "iptables": "adapters never import each other", module + "cache/sts": "adapters never import each other",
			"github.com/aws": "only cache/sts knows AWS", "k8s.io/client-go/kubernetes": "it registers every API group: 20 MB for nothing",
		}},
		{"cache/sts", map[string]string{
			module + "iptables": "adapters never import each other", module + "proxy": "adapters import the core they serve: cache",
			"k8s.io": "only proxy/pods knows Kubernetes",
		}},
		{"cmd/imdsgate/page", map[string]string{
			module + "iptables": "the page shows values and asks nobody", module + "cache/sts": "the page shows values and asks nobody",
		}},
		{"iptables", map[string]string{
			module: "the rules know nothing of pods or credentials", "k8s.io": "nor Kubernetes", "github.com/aws": "nor AWS",
		}},
	} {
		t.Run(tt.pkg, func(t *testing.T) {
			out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", module+tt.pkg).Output()
			if err != nil {
				t.Fatalf("go list: %v", err)
			}
			for dep := range strings.FieldsSeq(string(out)) {
				if dep == module+tt.pkg {
					continue
				}
				for prefix, why := range tt.banned {
					if strings.HasPrefix(dep, prefix) {
						t.Errorf("%s imports %s: %s", tt.pkg, dep, why)
					}
				}
			}
		})
	}
}

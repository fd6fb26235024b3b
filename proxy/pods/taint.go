package pods

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// RemoveTaint removes every taint with the given key from this node; none is success. The patch tests that nobody changed the
// taints in between: then it fails and is to be tried again. It needs the permission to get and patch the node.
func (p *Pods) RemoveTaint(ctx context.Context, key string) error {
	ctx, cancel := context.WithTimeout(ctx, p.listTimeout)
	defer cancel()
	var node corev1.Node
	if err := p.client.Get().Resource("nodes").Name(p.node).Do(ctx).Into(&node); err != nil {
		return fmt.Errorf("get node %s: %w", p.node, explainForbidden(err, "get", "nodes"))
	}
	left := slices.DeleteFunc(slices.Clone(node.Spec.Taints), func(t corev1.Taint) bool { return t.Key == key })
	if len(left) == len(node.Spec.Taints) {
		return nil
	}
	patch, err := json.Marshal([]map[string]any{
		{"op": "test", "path": "/spec/taints", "value": node.Spec.Taints},
		{"op": "replace", "path": "/spec/taints", "value": left},
	})
	if err != nil {
		return fmt.Errorf("remove taint %s: %w", key, err)
	}
	err = p.client.Patch(types.JSONPatchType).Resource("nodes").Name(p.node).Body(patch).Do(ctx).Error()
	if err != nil {
		return fmt.Errorf("remove taint %s from node %s: %w", key, p.node, explainForbidden(err, "patch", "nodes"))
	}
	return nil
}
